//! What is still awaited before the agent is ready, as guards that are dropped when it is there.
