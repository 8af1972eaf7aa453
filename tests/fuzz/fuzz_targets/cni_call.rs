//! What a runtime writes to the CNI plugin: its entry of a network configuration, a pod's
//! annotations, the result of the plugin before.
//!
//! What is accepted passes the result before on byte by byte, or with nothing but its version added.
//! Whatever comes, the plugin answers JSON, and a pod can go.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::cni::plugin::{Patience, configuration::read, run};

fuzz_target!(|data: &[u8]| {
    if let Ok(configuration) = read(data)
        && let Ok(result) = configuration.result()
    {
        let value: serde_json::Value = serde_json::from_slice(&result).expect("JSON");
        assert!(value.get("cniVersion").is_some());
        let text = String::from_utf8(result).expect("text");
        let added = text
            .strip_prefix(r#"{"cniVersion":""#)
            .and_then(|rest| rest.split_once('"'));
        let untouched = data.windows(text.len()).any(|part| part == text.as_bytes());
        let completed = added.is_some_and(|(_, rest)| {
            let rest = rest.trim_start_matches(',');
            data.windows(rest.len()).any(|part| part == rest.as_bytes())
        });
        assert!(untouched || completed);
    }
    // No agent and no pod: nothing outside is touched.
    for command in ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] {
        let variables = |name: &str| match name {
            "CNI_COMMAND" => Some(command.into()),
            "CNI_NETNS" => Some("/proc/self/ns/net".into()),
            _other => None,
        };
        let output = run(variables, data, Patience::default());
        assert!(output.success || command != "DEL");
        if !output.text.is_empty() {
            let value: serde_json::Value = serde_json::from_slice(&output.text).expect("JSON");
            assert!(output.success || value.get("code").is_some());
        }
    }
});
