//! The room as a whole, in process: real TLS and real sockets on loopback addresses.
