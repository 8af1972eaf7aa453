//! Graceful end: one primitive, used by every loop.
