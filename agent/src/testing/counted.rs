//! How much memory a test holds: the allocator of unit tests, which counts for each thread what it
//! has taken and not given back. What another thread gives back counts there.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

#[global_allocator]
static COUNTED: Counted = Counted;

struct Counted;

thread_local! {
    /// Bytes; no destructor, so that it is there until the thread's end.
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

/// Bytes that this thread holds, less those that it has given back for others.
pub(crate) fn held() -> isize {
    HELD.get()
}

/// The most that [`held`] has been since this was called last.
pub(crate) fn most() -> isize {
    MOST.replace(HELD.get())
}

fn count(more: isize) {
    let held = HELD.get() + more;
    HELD.set(held);
    MOST.set(MOST.get().max(held));
}

// SAFETY: it is the system's allocator, and counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: what is asked of us is asked of the system.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the block is the system's: all are.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: what is asked of us is asked of the system.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.cast_signed() - layout.size().cast_signed());
        // SAFETY: the block is the system's: all are.
        unsafe { System.realloc(block, layout, size) }
    }
}
