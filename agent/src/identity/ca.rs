//! See the room's module documentation.
