//! `portolan-load`: traffic of a known kind for a known time, and what became of it.

use anyhow::Result;
use clap::{Parser, Subcommand};
use dataplane_tests::load::{Connect, ConnectServer, Load, PacedServer, Server, pin};
use std::net::Ipv4Addr;

/// Measures a path with many flows.
#[derive(Parser)]
#[command(name = "portolan-load")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Be the server: echo on a port (TCP and UDP); on those after it answer and close, discard, answer as HTTP does, and the
    /// same after some work.
    Serve {
        /// The first of the five ports.
        #[arg(long, default_value_t = 7000)]
        port: u16,
        /// The CPU of the server.
        #[arg(long)]
        cpu: Option<usize>,
    },
    /// Be a server that answers each request when a known time has passed: connections stay on a port, and end with their
    /// answer on the next.
    ServePaced {
        /// The first of the two ports.
        #[arg(long, default_value_t = 7010)]
        port: u16,
        /// The CPU of the server.
        #[arg(long)]
        cpu: Option<usize>,
    },
    /// Be the client, and print what was measured as one line of JSON.
    Run(Load),
    /// Be the server for `connect`.
    ServeConnect(ConnectServer),
    /// Call connect(2) again and again, and print how long a call takes as one line of JSON.
    Connect(Connect),
}

fn main() -> Result<()> {
    match Cli::parse().verb {
        Verb::Serve { port, cpu } => {
            cpu.map_or(Ok(()), pin)?;
            let mut server = Server::bind(Ipv4Addr::UNSPECIFIED.into(), Some(port))?;
            println!("serving");
            server.serve(|| false)
        }
        Verb::ServePaced { port, cpu } => {
            cpu.map_or(Ok(()), pin)?;
            let server = PacedServer::bind(Ipv4Addr::UNSPECIFIED.into(), port)?;
            println!("serving");
            server.serve()
        }
        Verb::ServeConnect(server) => server.serve(Ipv4Addr::UNSPECIFIED.into(), || println!("serving")),
        Verb::Connect(connect) => {
            println!("{}", serde_json::to_string(&connect.run()?)?);
            Ok(())
        }
        Verb::Run(load) => {
            println!("{}", serde_json::to_string(&load.run()?)?);
            Ok(())
        }
    }
}
