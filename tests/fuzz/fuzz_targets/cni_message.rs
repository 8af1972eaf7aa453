//! One packet between the CNI plugin and the agent, read by either side, and the file that the
//! plugin goes by while no agent answers.
//!
//! What is accepted comes out again as it went in; what is said about the rest is short.
#![no_main]

use libfuzzer_sys::fuzz_target;
use picomesh::cni::{
    intent::Intent,
    message::{Answer, MAX_MESSAGE, Question},
};

fuzz_target!(|data: &[u8]| {
    match Question::decode(data) {
        Ok(question) => {
            // Escapes may make it longer than what came; what we say ourselves has none.
            let again = question.encode();
            if again.len() <= MAX_MESSAGE {
                assert_eq!(Question::decode(&again), Ok(question));
            }
        }
        Err(why) => assert!(why.to_string().len() < 8 * 1024),
    }
    match Answer::decode(data) {
        Ok(answer) => {
            let again = answer.encode();
            if again.len() <= MAX_MESSAGE {
                assert_eq!(Answer::decode(&again), Ok(answer));
            }
        }
        Err(why) => assert!(why.to_string().len() < 8 * 1024),
    }
    match Intent::decode(data) {
        Ok(intent) => assert_eq!(Intent::decode(&intent.encode()), Ok(intent)),
        Err(why) => assert!(why.to_string().len() < 1024),
    }
});
