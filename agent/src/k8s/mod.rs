//! The cluster comes in.
