//! A connection's story: who calls, where to, may it, which endpoint, by what carrier; then bytes.
//!
//! One data thread per core, each with its own current-thread runtime, its own accepts, tunnels and
//! upstream sockets: a flow never leaves its thread. Nothing here waits for the API server, the
//! signer or a scrape.
