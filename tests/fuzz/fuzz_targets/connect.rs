//! What a CONNECT says: the authority and the header `forwarded`, as any client may send them.
//!
//! Input: the authority in the first line, then `name: value` lines.
#![no_main]

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Uri};
use libfuzzer_sys::fuzz_target;
use picomesh::proxy::hbone;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|byte| *byte == b'\n');
    let authority = Bytes::copy_from_slice(lines.next().unwrap_or_default());
    let Ok(authority) = Uri::from_maybe_shared(authority) else {
        return;
    };
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = authority;
    for line in lines.take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            continue;
        };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            request.headers_mut().append(name, value);
        }
    }

    let target = hbone::target(&request);
    if let Ok(target) = target {
        assert_ne!(target.port(), 0);
        assert_eq!(target.ip(), target.ip().to_canonical());
    }
    let claimed = hbone::claimed_client(request.headers());
    if let Ok(Some(client)) = claimed {
        assert_eq!(client.ip(), client.ip().to_canonical());
        // Who lets two be read lets a reader choose.
        let count = request.headers().get_all("forwarded").iter().count();
        assert_eq!(count, 1);
    }
    // What we would make of it ourselves says the same.
    if let (Ok(target), Ok(Some(client))) = (target, claimed) {
        let again = hbone::connect(client, target).expect("an address makes a request");
        assert_eq!(hbone::target(&again), Ok(target));
        assert_eq!(hbone::claimed_client(again.headers()), Ok(Some(client)));
    }
});
