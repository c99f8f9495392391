//! The laboratory, the packet builder and the program runner that the tests share.

pub mod api_server;
pub mod bench;
pub mod bench_agent;
pub mod bench_choose;
pub mod bench_counts;
pub mod bench_flood;
pub mod bench_load;
pub mod bench_net;
pub mod bench_prog;
pub mod bench_sync;
pub mod bench_tries;
pub mod controlplane;
pub mod deaf;
pub mod deploy;
mod docs;
pub mod kind;
pub mod lab;
pub mod layouts;
pub mod load;
pub mod oracle;
pub mod packet;
pub mod recipes;
pub mod serial;
pub mod soak;
pub mod tour;
