//! One packet on the hand-over's socket: a message, or why it is none.
//!
//! What is accepted comes out again as it went in, fits a packet, and names no more files than a
//! packet carries. What is said about a packet that is refused is short, however long that was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::handover::{
    Message,
    message::{MAX_FILES, MAX_MESSAGE, decode},
};

fuzz_target!(|data: &[u8]| {
    match decode(data) {
        Ok(message) => {
            assert!(data.len() <= MAX_MESSAGE);
            if let Message::Offer(offer) = &message {
                assert!(offer.files.len() <= MAX_FILES);
            }
            assert!(!message.name().is_empty());
            // Escapes may make it longer than what came; what we say ourselves has none.
            let again = message.encode();
            if again.len() <= MAX_MESSAGE {
                assert_eq!(decode(&again), Ok(message));
            }
        }
        Err(why) => assert!(why.to_string().len() < 16 * 1024),
    }
});
