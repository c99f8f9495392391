//! `portolan watch`: what becomes of flows, as it happens. The programs tell it by a ring ([`crate::kernel::events`]) as long as
//! somebody follows that, and any number may. Needs no agent, and slows nobody down: what is not read in time is lost, and counted.

mod filter;
mod line;
pub mod nodes;
mod tracker;

use super::AdminError;
use super::explain::ends_of_frontend;
use super::flows::host_and_port;
use super::names::{Names, is_of};
use super::services::protocol_name;
use crate::config::{PacketFilter, WatchArgs};
use crate::kernel::bpf::MapFd;
use crate::kernel::events::{self, EventRing, LEASE, NoMark, Reader, Told};
use crate::kernel::link::interface_name;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::status::timestamp_of;
use dataplane_common::event::{Ended, Event, EventKind, Place};
use dataplane_common::flow::Flow;
use dataplane_common::tables::{Events, LAYOUT, NodeAddrs, Table as _};
use dataplane_common::{Addr, Port, Protocol};
use filter::Filter;
pub use line::EventLine;
use std::collections::HashMap;
use std::io::{ErrorKind, Write as _};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant, SystemTime};
use tracker::{Ends, Tracker};

/// How often the ring is looked at: it has room for what comes in that time at 100,000 events a second.
const PERIOD: Duration = Duration::from_millis(20);
/// How often a reader says that it lives.
const RENEWAL: Duration = Duration::from_millis(500);
const _: () = assert!(RENEWAL.as_millis() * 4 < LEASE.as_millis());
/// How often the names of Services are read again for one that has none.
const NAMES_PERIOD: Duration = Duration::from_secs(1);

/// Watches this node until it is ended, or has shown as many events as were asked for.
///
/// # Errors
/// If there are no maps, or a filter names what is not there.
pub fn watch(args: &WatchArgs) -> Result<(), AdminError> {
    let mut screen = Screen::new(args);
    let mut begun = true;
    loop {
        let mut node = match Watched::open(args) {
            Ok(node) => node,
            // An upgrade replaces the maps: the next agent brings them.
            Err(AdminError::Map(MapError::Nothing { .. } | MapError::Open { .. })) if !begun => {
                std::thread::sleep(RENEWAL);
                if screen.is_closed() {
                    return Ok(());
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        if !begun {
            screen.show(EventLine::about("away", moment(0), 1))?;
        }
        begun = false;
        if node.follow(&mut screen)? {
            return Ok(());
        }
    }
}

/// Where lines go.
struct Screen {
    filter: Filter,
    output: crate::config::Output,
    /// How many are to be shown still.
    count: Option<u64>,
    is_closed: bool,
}

impl Screen {
    fn new(args: &WatchArgs) -> Self {
        let output = args.show.output;
        Self { filter: Filter::new(args), output, count: args.count, is_closed: false }
    }

    /// Shows a line, if it is wanted.
    fn show(&mut self, line: EventLine) -> Result<(), AdminError> {
        if self.is_closed || !self.filter.wants(&line) || line.count.is_none() && !self.filter.allows() {
            return Ok(());
        }
        match std::io::stdout().write_all(line.print(self.output)?.as_bytes()) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.is_closed = true,
            Err(error) => return Err(error.into()),
        }
        if line.count.is_none()
            && let Some(count) = &mut self.count
        {
            *count = count.saturating_sub(1);
            self.is_closed |= *count == 0;
        }
        Ok(())
    }

    /// Brings what was shown to whoever reads it, and says what was left out.
    fn flush(&mut self) -> Result<(), AdminError> {
        if let Some(count) = self.filter.left_out() {
            self.show(EventLine::about("left-out", moment(0), count))?;
        }
        match std::io::stdout().flush() {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Whether nobody reads any more, or enough was shown. A reader that has gone is noticed although there is nothing to say.
    fn is_closed(&mut self) -> bool {
        let mut stdout = libc::pollfd { fd: std::io::stdout().as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one descriptor, which outlives the call.
        let polled = unsafe { libc::poll(&raw mut stdout, 1, 0) };
        self.is_closed |= polled == 1 && stdout.revents & (libc::POLLERR | libc::POLLNVAL) != 0;
        self.is_closed
    }
}

/// This node's maps, and how far they were read.
struct Watched<'a> {
    args: &'a WatchArgs,
    maps: KernelMaps,
    reader: Reader,
    /// The id of the ring.
    ring: u32,
    names: Names,
    names_read: Instant,
    tracker: Tracker,
    interfaces: HashMap<u32, String>,
}

impl<'a> Watched<'a> {
    fn open(args: &'a WatchArgs) -> Result<Self, AdminError> {
        let maps = KernelMaps::open(&args.show.bpffs.join(LAYOUT))?;
        let names = Names::read(&args.show.bpffs);
        let ring = maps.map::<Events>()?.raw().shape().id;
        let mut reader = Reader::new(EventRing::open(&maps)?);
        if let Some(wanted) = &args.packets {
            let service = wanted.service.as_ref().map_or(Ok(0), |service| service_id(&names, service))?;
            reader.want_packets(wanted.client, service).map_err(no_mark)?;
        }
        Ok(Self {
            args,
            maps,
            reader,
            ring,
            names,
            names_read: Instant::now(),
            tracker: Tracker::default(),
            interfaces: HashMap::new(),
        })
    }

    /// Shows what comes; whether nobody reads it any more. Else the maps were replaced.
    fn follow(&mut self, screen: &mut Screen) -> Result<bool, AdminError> {
        let mut renewed = Instant::now();
        loop {
            let mut told = Vec::new();
            self.reader.read(|one| told.push(one));
            for one in told {
                let line = match one {
                    Told::Event(event) => self.line(&event)?,
                    Told::Lost(count) => Some(EventLine::about("lost", moment(0), count)),
                };
                if let Some(line) = line {
                    screen.show(line)?;
                }
            }
            if renewed.elapsed() >= RENEWAL {
                self.reader.renew().map_err(no_mark)?;
                renewed = Instant::now();
                let missed = self.reader.missed_packets();
                if missed > 0 && self.args.packets.is_some() {
                    screen.show(EventLine::about("left-out", moment(0), missed))?;
                }
                let pin = self.args.show.bpffs.join(LAYOUT).join(Events::NAME);
                if MapFd::open(&pin).map_or(0, |map| map.shape().id) != self.ring {
                    return Ok(false);
                }
            }
            screen.flush()?;
            if screen.is_closed() {
                return Ok(true);
            }
            std::thread::sleep(PERIOD);
        }
    }

    /// An event for people; none if it is of a kind that this version does not know, or a packet that only others want.
    fn line(&mut self, event: &Event) -> Result<Option<EventLine>, AdminError> {
        let (Some(kind), Some(place)) = (event.what.kind(), event.what.place()) else { return Ok(None) };
        if kind == EventKind::Packet
            && !self.args.packets.as_ref().is_some_and(|wanted| self.is_wanted(wanted, event))
        {
            return Ok(None);
        }
        let ends = Whole::of(kind, event);
        let flow = Ends { client: ends.client, frontend: ends.frontend, proto: event.key.proto() };
        let times = self.tracker.follow(kind, flow, event);
        let is_flow = ends.endpoint.is_some();
        let service = if is_flow { Some(event.service) } else { self.service_at(ends.frontend, event)? };
        let ended = |value: u64| (kind == EventKind::Ended).then_some(value);
        let is_packet = event.length > 0;
        Ok(Some(EventLine {
            time: moment(events::now().saturating_sub(event.time)),
            node: None,
            event: kind_name(kind).to_owned(),
            hook: Some(place_name(place).to_owned()),
            interface: (event.interface != 0).then(|| self.interface(event.interface)),
            protocol: Some(protocol_name(event.key.proto())),
            client: address(ends.client),
            client_name: self.own(&ends.client.0)?,
            service: service.map(|id| self.name(id)),
            frontend: address(ends.frontend),
            endpoint: ends.endpoint.and_then(address),
            endpoint_name: ends.endpoint.map_or(Ok(None), |endpoint| self.own(&endpoint.0))?,
            translated_source: ends.translated.and_then(address),
            reason: event.what.reason().map(|reason| reason.label().to_owned()),
            end: event.what.end().map(|end| end_name(end).to_owned()),
            packets_in: ended(event.packets_in.into()),
            bytes_in: ended(event.bytes_in),
            packets_out: ended(event.packets_out.into()),
            bytes_out: ended(event.bytes_out),
            handshake_microseconds: times.handshake.map(|time| time / 1_000),
            lasted_microseconds: times.lasted.map(|time| time / 1_000),
            sent_by: is_packet.then(|| if ends.by_endpoint { "endpoint" } else { "client" }.to_owned()),
            length: is_packet.then_some(event.length),
            tcp_flags: (is_packet && event.key.proto() == Protocol::Tcp.number())
                .then(|| tcp_flags(event.transport_flags)),
            sequence: (is_packet && event.key.proto() == Protocol::Tcp.number()).then_some(event.sequence),
            count: None,
        }))
    }

    /// Whether a packet is of a flow that this reader wants: others may have marked it.
    fn is_wanted(&self, wanted: &PacketFilter, event: &Event) -> bool {
        let ends = Whole::of(EventKind::Packet, event);
        let of_service =
            wanted.service.as_ref().is_none_or(|service| is_of(&self.names.name(event.service), service));
        of_service && wanted.is_of(&ends.client.0)
    }

    /// The service port at the address that a packet calls which is of no flow.
    fn service_at(&self, (addr, port): (Addr, Port), event: &Event) -> Result<Option<u32>, AdminError> {
        let Ok(protocol) = Protocol::try_from(event.key.proto()) else { return Ok(None) };
        let to = SocketAddr::new(addr.to_ip(), port.number());
        let frontend = ends_of_frontend(&self.maps, to, protocol)?;
        Ok(frontend.map(|frontend| frontend.service()).filter(|id| *id != 0))
    }

    fn name(&mut self, id: u32) -> String {
        let name = self.names.name(id);
        if name.starts_with('#') && self.names_read.elapsed() >= NAMES_PERIOD {
            (self.names, self.names_read) = (Names::read(&self.args.show.bpffs), Instant::now());
            return self.names.name(id);
        }
        name
    }

    /// `node`, if the address is one of this node.
    fn own(&self, addr: &Addr) -> Result<Option<String>, AdminError> {
        Ok(self.maps.map::<NodeAddrs>()?.get(addr)?.map(|_| "node".to_owned()))
    }

    fn interface(&mut self, index: u32) -> String {
        let name = || interface_name(index).unwrap_or_else(|| format!("#{index}"));
        self.interfaces.entry(index).or_insert_with(name).clone()
    }
}

/// The ends of the flow that an event is of.
struct Whole {
    client: (Addr, Port),
    frontend: (Addr, Port),
    endpoint: Option<(Addr, Port)>,
    translated: Option<(Addr, Port)>,
    by_endpoint: bool,
}

impl Whole {
    fn of(kind: EventKind, event: &Event) -> Self {
        let Event { key, src, src_port, dst, dst_port, .. } = event;
        let (from, to) = ((key.src, key.src_port), (key.dst, key.dst_port));
        let (as_from, as_to) = ((*src, *src_port), (*dst, *dst_port));
        match kind {
            EventKind::Refused | EventKind::Dropped => {
                Self { client: from, frontend: to, endpoint: None, translated: None, by_endpoint: false }
            }
            EventKind::Begun
            | EventKind::Moved
            | EventKind::Established
            | EventKind::Ended
            | EventKind::Packet => {
                if event.is_reply() {
                    let translated = (to != as_to).then_some(to);
                    let endpoint = Some(from);
                    Self { client: as_to, frontend: as_from, endpoint, translated, by_endpoint: true }
                } else {
                    let translated = (from != as_from).then_some(as_from);
                    Self { client: from, frontend: to, endpoint: Some(as_to), translated, by_endpoint: false }
                }
            }
        }
    }
}

const _: () = assert!(Flow::REPLY == 1);

/// `10.0.0.1:80`; the address alone where no port is known, and nothing where no address is.
fn address((addr, port): (Addr, Port)) -> Option<String> {
    if addr.is_unspecified() {
        return None;
    }
    let host = addr.to_string();
    Some(if port == Port::ANY { host } else { host_and_port(&host, port.number()) })
}

/// The address alone, of what [`address`] has written.
fn host(end: &str) -> &str {
    match end.rsplit_once(':') {
        // An IPv6 address without a port has colons too.
        Some((host, _)) if end.starts_with('[') || !host.contains(':') => host.trim_matches(['[', ']']),
        Some(_) | None => end,
    }
}

/// The moment so many nanoseconds ago.
fn moment(ago: u64) -> String {
    timestamp_of(SystemTime::now() - Duration::from_nanos(ago))
}

/// The id of a service port: by its whole name, or that of a Service with one port.
fn service_id(names: &Names, wanted: &str) -> Result<u32, AdminError> {
    let found = names.ids(wanted);
    match found[..] {
        [id] => Ok(id),
        [] => Err(AdminError::End(format!(
            "the kernel has no Service {wanted}: `portolan services` lists what there is"
        ))),
        _ => Err(AdminError::End(format!(
            "{wanted} has several ports, or two IP families: write namespace/name:port, or leave out the Service"
        ))),
    }
}

fn no_mark(_: NoMark) -> AdminError {
    AdminError::End("others watch packets already: there is room for four at once".to_owned())
}

fn tcp_flags(flags: u16) -> String {
    const NAMES: [&str; 6] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG"];
    let set = NAMES.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 == 1);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(",")
}

/// The name of a kind of events.
pub const fn kind_name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Begun => "begun",
        EventKind::Moved => "moved",
        EventKind::Established => "established",
        EventKind::Refused => "refused",
        EventKind::Dropped => "dropped",
        EventKind::Ended => "ended",
        EventKind::Packet => "packet",
    }
}

const fn place_name(place: Place) -> &'static str {
    match place {
        Place::Sweep => "sweep",
        Place::Xdp => "xdp",
        Place::UplinkIn => "uplink-in",
        Place::UplinkOut => "uplink-out",
        Place::PodIn => "pod-in",
        Place::PodOut => "pod-out",
        Place::Connect => "connect",
        Place::Sendmsg => "sendmsg",
        Place::Room => "room",
    }
}

const fn end_name(end: Ended) -> &'static str {
    match end {
        Ended::Closed => "closed",
        Ended::Reset => "reset",
        Ended::Refused => "refused",
        Ended::Idle => "idle",
        Ended::Displaced => "displaced",
    }
}
