//! Questions by UDP, each from a port of its own, through a node port to one endpoint on another node.

use super::PATIENCE;
use crate::lab::layout::End::There;
use crate::lab::layout::On::Uplink;
use crate::lab::layout::Target::NodePort;
use crate::lab::layout::{Proxy, Raised, Who};
use crate::lab::{Asked, Family, ask_datagram};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// More addresses of the client: from one alone, ports would come again after a few seconds.
const ADDRESSES: u64 = 20;
const FIRST_ADDRESS: u8 = 210;
const FIRST_PORT: u64 = 10_000;
const PORTS: u64 = 50_000;
/// Who asks at the same time, each its part of the rate.
const ASKING: u64 = 4;

/// What became of them with one proxy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Questions {
    /// Who served.
    pub proxy: Proxy,
    /// Seconds of it.
    pub seconds: f64,
    /// Questions in a second that were wanted.
    pub wanted: u32,
    /// Those that were answered.
    pub good: u64,
    /// Those that were not, in five seconds.
    pub failed: u64,
}

impl Questions {
    /// For people.
    pub(super) fn line(&self) -> String {
        let Self { proxy, seconds, wanted, good, failed } = self;
        let rate = *good as f64 / seconds;
        format!(
            "{}: {rate:.0} of {wanted} questions by UDP in a second answered for {seconds:.0} s, {failed} failed",
            proxy.name()
        )
    }
}

/// Asks for that long.
pub(super) fn measure(raised: &Raised, proxy: Proxy, time: Duration, rate: u32) -> Result<Questions> {
    let place = raised.place(Who::Client)?;
    let lines = (0..ADDRESSES).map(|number| format!("addr add {}/24 dev eth0", source(number).ip()));
    place.ip(&lines.collect::<Vec<_>>())?;
    let to = raised.address(NodePort(There, Uplink), Family::V4);
    let (good, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..ASKING)
            .map(|part| {
                let (place, good, failed) = (&place, &good, &failed);
                scope.spawn(move || {
                    place.enter(|| {
                        let mut number = part;
                        while begun.elapsed() < time {
                            let due = begun + Duration::from_secs_f64(number as f64 / f64::from(rate));
                            std::thread::sleep(due.saturating_duration_since(Instant::now()));
                            let counter = if ask(source(number), to).is_ok() { good } else { failed };
                            counter.fetch_add(1, Ordering::Relaxed);
                            number += ASKING;
                        }
                    })
                })
            })
            .collect();
        asking
            .into_iter()
            .try_for_each(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Questions { proxy, seconds, wanted: rate, good: good.into_inner(), failed: failed.into_inner() })
}

/// Where question number `number` comes from.
fn source(number: u64) -> SocketAddr {
    let address = Ipv4Addr::new(192, 168, 100, FIRST_ADDRESS + (number % ADDRESSES) as u8);
    SocketAddr::new(address.into(), (FIRST_PORT + number / ADDRESSES % PORTS) as u16)
}

fn ask(from: SocketAddr, to: SocketAddr) -> Asked {
    let socket = UdpSocket::bind(from)?;
    socket.connect(to)?;
    ask_datagram(&socket, None, PATIENCE)
}
