//! Memory given back. jemalloc keeps freed pages for the next burst and returns them by a clock
//! that only allocations move; a proxy that falls silent after a burst would keep them for good.
//! So `app` winds that clock once a second.
//!
//! Which allocator is in force is the binary's matter. Where it is another one (unit tests), this
//! winds a clock that nobody looks at.

/// `MALLCTL_ARENAS_ALL`, as jemalloc's header has it: every arena.
const DECAY_ALL_ARENAS: &std::ffi::CStr = c"arena.4096.decay";

/// Returns pages that have been free for longer than the configured time. Microseconds.
pub fn give_back() {
    // SAFETY: `arena.<i>.decay` neither reads nor writes a value, which null pointers and zero
    // lengths say; the name is a C string.
    let result = unsafe {
        tikv_jemalloc_sys::mallctl(
            DECAY_ALL_ARENAS.as_ptr(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            0,
        )
    };
    debug_assert_eq!(result, 0, "jemalloc does not know arena.4096.decay");
}

#[cfg(test)]
mod tests {
    #[test]
    fn jemalloc_knows_the_call() {
        super::give_back();
    }
}
