//! Memory given back, the allocator's and the program's own.
//!
//! jemalloc keeps freed pages for the next burst and returns them by a clock that only allocations
//! move; a proxy that falls silent after a burst would keep them for good. So `app` winds that
//! clock once a second ([`give_back`]).
//!
//! A start, a reading of manifests or a burst runs megabytes of code that nothing needs afterwards
//! (parsers, conversions, loaders, handshakes), and leaves garbage of the same size. When it is
//! over, which [`processor_time`] tells, `app` calls [`settle`].
//!
//! Which allocator is in force is the binary's matter. Where it is another one (unit tests), this
//! winds a clock that nobody looks at.

use std::{ffi::CStr, fs, ptr, time::Duration};

use nix::{
    libc,
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeVal,
    },
};

/// `MALLCTL_ARENAS_ALL`, as jemalloc's header has it: every arena.
const DECAY_ALL_ARENAS: &CStr = c"arena.4096.decay";
const PURGE_ALL_ARENAS: &CStr = c"arena.4096.purge";

/// Returns pages that have been free for longer than the configured time. Microseconds.
pub fn give_back() {
    tell_jemalloc(DECAY_ALL_ARENAS);
}

/// Returns every free page at once, and lets go of the program's code: what goes on running is
/// mapped again out of the page cache, some ten pages at a time, and costs a millisecond in all.
pub fn settle() {
    tell_jemalloc(PURGE_ALL_ARENAS);
    // Without /proc the code stays mapped, and that is all.
    let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, length) in maps.lines().filter_map(unwritten) {
        // SAFETY: the pages are a file's, mapped private, and nobody can have written to them;
        // the kernel reads them again from the file when they are touched.
        let _only_advice = unsafe {
            libc::madvise(
                ptr::without_provenance_mut(start),
                length,
                libc::MADV_DONTNEED,
            )
        };
    }
}

/// What all threads have run so far. Zero where the kernel does not tell.
pub fn processor_time() -> Duration {
    let of = |time: TimeVal| {
        let micros = u64::try_from(time.tv_usec()).unwrap_or(0);
        Duration::from_secs(u64::try_from(time.tv_sec()).unwrap_or(0))
            + Duration::from_micros(micros)
    };
    getrusage(UsageWho::RUSAGE_SELF)
        .map(|usage| of(usage.user_time()) + of(usage.system_time()))
        .unwrap_or_default()
}

/// Where a line of /proc/self/maps tells of code, or of the constants that lie in front of it.
/// Other read-only pages were written to before they became so (relocations), and must stay.
fn unwritten(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (range, rights, offset) = (fields.next()?, fields.next()?, fields.next()?);
    let file = fields.nth(2)?;
    let code = rights == "r-xp" || (rights == "r--p" && offset == "00000000");
    if !code || !file.starts_with('/') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    Some((start, end.checked_sub(start)?))
}

fn tell_jemalloc(what: &CStr) {
    // SAFETY: these calls neither read nor write a value, which null pointers and zero lengths
    // say; the name is a C string.
    let result = unsafe {
        tikv_jemalloc_sys::mallctl(
            what.as_ptr(),
            ptr::null_mut(),
            ptr::null_mut(),
            ptr::null_mut(),
            0,
        )
    };
    debug_assert_eq!(result, 0, "jemalloc does not know {what:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_file_kib() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssFile:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse().unwrap()
    }

    #[test]
    fn jemalloc_knows_the_calls() {
        give_back();
        settle();
    }

    #[test]
    fn who_works_spends_processor_time() {
        let before = processor_time();
        let worked = (0..u64::MAX).any(|_| processor_time() > before);
        assert!(worked);
    }

    #[test]
    fn code_that_is_let_go_is_no_longer_resident_and_runs_on() {
        // Other tests run beside this one and map code again.
        let shrank = (0..20).any(|_| {
            let before = resident_file_kib();
            settle();
            resident_file_kib() < before
        });
        assert!(shrank);
    }

    #[test]
    fn only_what_nobody_can_have_written_to_is_let_go() {
        let of = |line| unwritten(line);
        let line = "7f0000001000-7f0000003000 r-xp 00001000 fe:00 77   /usr/bin/picomesh-agent";
        assert_eq!(of(line), Some((0x7f00_0000_1000, 0x2000)));
        assert!(of("7f0000000000-7f0000001000 r--p 00000000 fe:00 77   /usr/bin/agent").is_some());
        for kept in [
            // Relocated, then made read-only.
            "7f0000004000-7f0000005000 r--p 00004000 fe:00 77   /usr/bin/picomesh-agent",
            "7f0000005000-7f0000006000 rw-p 00005000 fe:00 77   /usr/bin/picomesh-agent",
            "7f0000006000-7f0000007000 r-xp 00000000 00:00 0",
            "7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0    [vdso]",
        ] {
            assert_eq!(of(kept), None, "{kept}");
        }
    }
}
