//! `connect(2)` with and without the socket hooks, in a laboratory of one node: the middle call of short turns.

use super::Effort;
use crate::bench::target::Ratio;
use crate::lab::{
    self, AgentOptions, Client, Endpoint, Lab, Options, Place, PodOptions, Process, Service, at, program,
};
use crate::load::ConnectOutcome;
use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::time::Duration;

/// How long each leg connects in each of its turns.
const SECONDS: &str = "0.05";
/// Turns of each leg in a round. The middle one counts: what comes between disturbs one or two.
const TURNS: usize = 5;
/// The port that the server listens on.
const PORT: u16 = 7000;
/// The Service's address.
const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 77);

/// Calls of `connect(2)` of one kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connects {
    /// What is connected to what, with hooks or without.
    pub what: String,
    /// Calls per second, by the time of the middle one.
    pub per_second: Ratio,
    /// The same over what has no hooks, round by round; nothing for that itself.
    pub ratio: Option<Ratio>,
}

impl Connects {
    pub(super) fn ratio_text(&self) -> String {
        self.ratio.map_or_else(String::new, |ratio| format!("{ratio} of that without hooks"))
    }
}

/// One way to connect.
struct Leg {
    what: &'static str,
    place: Place,
    arguments: Vec<String>,
    /// The leg that it is held against.
    beside: Option<usize>,
}

impl Leg {
    /// Calls per second of one turn, by the time of the middle one.
    fn rate(&self, load: &str) -> Result<f64> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let text = self.place.run(load, &arguments)?;
        let outcome: ConnectOutcome = serde_json::from_str(text.trim()).context("portolan-load connect")?;
        Ok(1e9 / outcome.nanoseconds.max(1) as f64)
    }
}

/// Measures all ways in turn.
pub(super) fn measure(effort: Effort) -> Result<Vec<Connects>> {
    let lab = Options::default().nodes(1).create()?;
    lab::on_signal_exit_with(130);
    let (_server, legs) = prepare(&lab)?;
    let load = program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?;
    let load = load.to_str().context("path")?;
    let mut rates: Vec<Vec<Option<f64>>> = vec![Vec::new(); legs.len()];
    for _ in 0..effort.samples {
        let mut turns: Vec<Vec<f64>> = vec![Vec::new(); legs.len()];
        for _ in 0..TURNS {
            for (leg, turns) in legs.iter().zip(&mut turns) {
                turns.push(leg.rate(load)?);
            }
        }
        for (turns, rates) in turns.into_iter().zip(&mut rates) {
            rates.push(Ratio::among(turns).map(|turns| turns.median));
        }
    }
    legs.iter()
        .zip(&rates)
        .map(|(leg, of_leg)| {
            let per_second =
                Ratio::among(of_leg.iter().flatten().copied()).context("nothing was measured")?;
            let ratio = leg.beside.and_then(|beside| Ratio::of(of_leg, &rates[beside]));
            Ok(Connects { what: leg.what.into(), per_second, ratio })
        })
        .collect()
}

fn prepare(lab: &Lab) -> Result<(Process, Vec<Leg>)> {
    let client = lab.add_pod("shell", 0, &PodOptions::client())?;
    let server = lab.add_pod("server", 0, &PodOptions::client())?;
    let mut command = server.place().command(program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?)?;
    command.args(["serve-connect", "--port", &PORT.to_string(), "--cpu", "1"]);
    let process = Process::start(&lab.logs(), "load-server", command)?;
    process.wait_for_line(Duration::from_secs(10), |line| line == "serving")?;
    let endpoint = Endpoint::new("server", server.address(), server.node());
    let service = Service::new("bench", CLUSTER_IP).tcp(PORT, PORT).endpoints([endpoint]);
    lab.manifests().apply(&service)?;
    lab.start_agents(&AgentOptions::default().arguments(&["--socket-lb=all"]))?;
    let answered = Client::at(client.place()).timeout(Duration::from_secs(10)).connect(at(CLUSTER_IP, PORT));
    answered.map_err(|failure| anyhow::anyhow!("the Service does not answer: {failure:?}"))?;
    // The hooks go by cgroup: the outside client's is not below the node's.
    let bare = Place::new("bare", client.place().namespace(), lab.client().cgroup());
    let (pod, service) = (format!("{}:{PORT}", server.address()), format!("{CLUSTER_IP}:{PORT}"));
    let leg = |what, place: &Place, to: &str, more: &[&str], beside| {
        let arguments = ["connect", "--to", to, "--seconds", SECONDS, "--cpu", "0"];
        let arguments = arguments.iter().chain(more).map(|&word| word.to_owned()).collect();
        Leg { what, place: place.clone(), arguments, beside }
    };
    let hooked = client.place();
    let legs = vec![
        leg("TCP to a pod, without hooks", &bare, &pod, &[], None),
        leg("TCP to a pod, with hooks", hooked, &pod, &[], Some(0)),
        leg("TCP to a ClusterIP, with hooks", hooked, &service, &[], Some(0)),
        leg("UDP to a pod, without hooks", &bare, &pod, &["--udp"], None),
        leg("UDP to a pod, with hooks", hooked, &pod, &["--udp"], Some(3)),
    ];
    Ok((process, legs))
}
