//! `portolan`: the node agent and its command line.

use anyhow::{Context as _, Result};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _};
use dataplane_user::admin::status::Verdict;
use dataplane_user::admin::{self, View, check, explain, remote, report, status};
use dataplane_user::agent;
use dataplane_user::causes::causes;
use dataplane_user::config::kube_proxy;
use dataplane_user::config::{
    AgentArgs, CleanupArgs, Cli, Command, LogFormat, NoteArgs, ProbeCommand, ReportArgs, ShowArgs,
};
use dataplane_user::heartbeat::Log;
use dataplane_user::kernel::capability;
use dataplane_user::kernel::cleanup::cleanup;
use dataplane_user::kernel::pins::Pins;
use dataplane_user::snapshot;
use dataplane_user::version;
use dataplane_user::watch;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    end_at_a_panic();
    // Here and not in the library: a new commit compiles this file alone again.
    version::set_revision(option_env!("PORTOLAN_REVISION"));
    let matches = Cli::command().version(version::text()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match log_to_stderr(&cli.log, cli.logging_format).and_then(|()| run(cli.command, &matches)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("portolan: {}", causes(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, matches: &ArgMatches) -> Result<ExitCode> {
    if let Some(show) = command.asks() {
        if let Some(node) = &show.node {
            return ask_other(node);
        }
        if show.all_nodes {
            let (text, code) = remote::ask_all(std::env::args_os().skip(1), show.output)?;
            print(&text)?;
            return Ok(ExitCode::from(code));
        }
    }
    match command {
        Command::Agent(mut args) => {
            read_config(&mut args, matches)?;
            agent::run(*args)?;
        }
        Command::MountBpffs(args) => match Pins::new(&args.bpffs).prepare()? {
            Some(at) => println!("mounted a BPF file system at {}", at.display()),
            None => println!("{} lies on a BPF file system already", args.bpffs.display()),
        },
        Command::NoteApiServer(args) => note_api_server(&args)?,
        Command::SetConntrack(args) => {
            for (setting, made) in args.wanted().apply() {
                println!("{}: {}", setting.name(), made.told(&setting));
            }
        }
        Command::Cleanup(args) => clean_up(&args)?,
        Command::Status(args) => {
            let (verdict, text) = if args.show.all_nodes {
                let page = status::nodes::look()?;
                (page.verdict, page.print(args.show.output)?)
            } else {
                let page = status::look(&args.show.bpffs)?;
                (page.verdict, page.print(args.show.output)?)
            };
            print(&text)?;
            let is_allowed = args.allow_warnings && verdict == Verdict::Warning;
            return Ok(if is_allowed { ExitCode::SUCCESS } else { verdict.code().into() });
        }
        Command::Services(args) => show(View::Services, &args)?,
        Command::Backends(args) => show(View::Backends, &args)?,
        Command::Flows(args) => show(View::Flows, &args)?,
        Command::Drops(args) => show(View::Drops, &args)?,
        Command::TakeOver(args) => show(View::TakeOver, &args)?,
        Command::Check(args) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let page = if args.pods {
                runtime.block_on(check::pods::look(&args))
            } else {
                runtime.block_on(check::look(&args))
            };
            // What still waits for kubectl is not waited for.
            runtime.shutdown_background();
            let page = page?;
            print(&page.print(args.show.output)?)?;
            return Ok(page.verdict.code().into());
        }
        Command::Report(args) => report(&args)?,
        Command::Explain(args) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let explanation = runtime.block_on(explain::explain(&args))?;
            print(&explanation.print(args.show.output)?)?;
            return Ok(explanation.verdict.code().into());
        }
        Command::Watch(args) if args.is_remote() => admin::watch::nodes::watch(&args)?,
        Command::Watch(args) => admin::watch::watch(&args)?,
        Command::Probe(ProbeCommand::Serve(args)) => check::probe::serve(&args)?,
        Command::Probe(ProbeCommand::Ask(args)) => {
            print(&(serde_json::to_string(&check::probe::ask(&args))? + "\n"))?;
        }
        Command::Completion(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "portolan", &mut script);
            print(&String::from_utf8(script)?)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Has another node say what this command line asks, and ends as it ends there.
fn ask_other(node: &str) -> Result<ExitCode> {
    let answer = remote::ask(node, std::env::args_os().skip(1))?;
    eprint!("{}", answer.err);
    print(&answer.out)?;
    let code = answer.code.and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// What kube-proxy's configuration file says, where no flag says otherwise.
fn read_config(args: &mut AgentArgs, matches: &ArgMatches) -> Result<()> {
    let Some(file) = args.config.clone() else { return Ok(()) };
    let given = |flag: &str| {
        let source = matches.subcommand_matches("agent").and_then(|matches| matches.value_source(flag));
        source.is_some_and(|source| source != ValueSource::DefaultValue)
    };
    let ignored = kube_proxy::apply(args, &file, &given)?;
    if !ignored.is_empty() {
        tracing::warn!(
            "{} says what means nothing here and is ignored: {}",
            file.display(),
            ignored.join(", ")
        );
    }
    Ok(())
}

fn report(args: &ReportArgs) -> Result<()> {
    let mut archive = Vec::new();
    if args.is_remote() {
        report::nodes::write(args, &mut archive)?;
    } else {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(report::write(args, &mut archive))?;
    }
    match &args.output {
        Some(file) => {
            std::fs::write(file, archive).with_context(|| format!("cannot write {}", file.display()))?;
            println!("wrote {}", file.display());
        }
        None if std::io::stdout().is_terminal() => {
            anyhow::bail!(
                "an archive is nothing for a terminal: name a file by --output, or send it to one by >"
            )
        }
        None => std::io::stdout().write_all(&archive)?,
    }
    Ok(())
}

fn clean_up(args: &CleanupArgs) -> Result<()> {
    capability::check()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut count = 0;
    let mut removed = |what: String| {
        count += 1;
        println!("removed {what}");
    };
    runtime.block_on(cleanup(&args.bpffs, &mut removed))?;
    if !args.keep_state {
        snapshot::remove(&args.state_dir, &mut removed)?;
    }
    if count == 0 {
        println!("nothing to remove at {} and on the interfaces here", args.bpffs.display());
    }
    Ok(())
}

fn note_api_server(args: &NoteArgs) -> Result<()> {
    let file = args.kubelet_kubeconfig.display();
    // One source of several: an agent that finds the API server elsewhere must not wait for it.
    let servers = watch::cluster::servers_of(&args.kubelet_kubeconfig).unwrap_or_else(|error| {
        eprintln!("portolan: {error}; nothing is noted");
        Vec::new()
    });
    if servers.is_empty() {
        println!("{file} names no API server");
        return Ok(());
    }
    snapshot::servers::write(&args.state_dir, snapshot::servers::Source::Kubelet, &servers)
        .with_context(|| format!("cannot write to --state-dir {}", args.state_dir.display()))?;
    println!("{file} names {}", servers.join(", "));
    Ok(())
}

/// A task that panicked would be missing in silence. In release builds there is nothing else; here it is the same in all.
fn end_at_a_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

fn show(view: View, args: &ShowArgs) -> Result<()> {
    print(&admin::show(view, args)?)
}

/// A reader that stops reading, such as `head`, is no error.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// stdout is for results and the line `ready`; everything else goes to stderr.
fn log_to_stderr(filter: &str, format: LogFormat) -> Result<()> {
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(format!("{},{filter}", dataplane_user::watch::LOG_FILTER))?)
        .with_writer(|| Log)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    Ok(())
}
