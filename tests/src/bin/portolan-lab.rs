//! `portolan-lab`: the laboratory from the command line.

use anyhow::Result;
use clap::{Parser, Subcommand};
use dataplane_tests::bench_prog::kernel_memory_beside_flows;
use dataplane_tests::controlplane::Binaries;
use dataplane_tests::{kind, lab, layouts, tour};
use dataplane_user::kernel::bpf::possible_cpus;
use std::ffi::OsString;
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "portolan-lab", about = "Portolan's laboratory")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Raise a lab with agents and a web server, and show what the dataplane does; stays up until Ctrl-C.
    Run(tour::TourOptions),
    /// Run a command in a place of a running lab: a node, a pod, `client` or `net`.
    Exec {
        /// Which lab, if several run.
        #[arg(long)]
        lab: Option<String>,
        /// The place, such as `node-1`, `web-0` or `client`.
        place: String,
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// The pod server (run by the lab inside pods).
    Serve(lab::server::Server),
    /// Carry the packets of a TUN device to other nodes (run by the lab on nodes).
    Carry(lab::tunnel::Carrier),
    /// Ask a pod server (run in containers of a cluster).
    #[command(hide = true)]
    Ask(kind::ask::Question),
    /// What Docker runs containers with where it is the laboratory's own.
    #[command(hide = true, disable_help_flag = true)]
    Runc {
        /// Handed to runc.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// A lab without agents, up until Ctrl-C.
    Up {
        /// How many nodes.
        #[arg(long, default_value_t = 1)]
        nodes: u8,
    },
    /// Raise nodes as people have them, with Portolan and with kube-proxy, and ask who is served.
    Layouts(layouts::LayoutsArgs),
    /// Make the maps of an agent at their default sizes, and say what they take with the CPUs that there could be here.
    #[command(hide = true)]
    Maps,
    /// Find or build the programs of the control plane, so that no test waits for that.
    #[command(hide = true)]
    Prepare,
    /// Remove what killed labs left behind.
    Clean,
}

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("portolan-lab: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    match Arguments::parse().verb {
        Verb::Run(options) => return tour::run(&options),
        Verb::Exec { lab, place, command } => {
            let status = lab::exec(lab.as_deref(), &place, &command)?;
            return Ok(ExitCode::from(status.code().and_then(|code| code.try_into().ok()).unwrap_or(1)));
        }
        Verb::Serve(server) => lab::server::serve(server)?,
        Verb::Carry(carrier) => lab::tunnel::carry(&carrier)?,
        Verb::Ask(question) => kind::ask::ask(&question)?,
        Verb::Runc { arguments } => kind::runtime::become_runc(&arguments)?,
        Verb::Up { nodes } => {
            let lab = lab::Options::default().nodes(nodes).create()?;
            lab::on_signal_exit_with(0);
            println!("lab {} is up", lab.id());
            loop {
                std::thread::park();
            }
        }
        Verb::Layouts(args) => {
            return Ok(if layouts::run(&args)? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Verb::Maps => {
            let mebibytes = kernel_memory_beside_flows()? as f64 / f64::from(1 << 20);
            println!("all maps but flows take {mebibytes:.1} MiB with {} possible CPUs", possible_cpus()?);
        }
        Verb::Prepare => {
            Binaries::find_or_build()?.find_or_build_extras()?;
        }
        Verb::Clean => match lab::sweep()?.as_slice() {
            [] => println!("nothing to remove"),
            removed => println!("removed {}", removed.join(" ")),
        },
    }
    Ok(ExitCode::SUCCESS)
}
