//! Attaching: each program at its hooks, each link pinned, so that the end of this process touches no packet (C3).
//!
//! A link that is pinned already gets the new program in its place; what is not wanted any more is removed after what is
//! wanted is there. A hook that fails is told and tried again; it never stops the others.

use super::clsact;
use super::hook::{Hook, SOCKET_HOOKS, SocketHook};
use super::link::{self, Link, Target};
use super::links::{Interfaces, Role};
use super::object::{Object, ObjectError, Programs};
use super::pins::{PinError, Pins};
use super::probe::{self, Cgroup, Features};
use crate::config::{SocketLb, XdpMode};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

// linux/if_link.h.
const XDP_GENERIC: u32 = 1 << 1;
const XDP_NATIVE: u32 = 1 << 2;

/// Drivers that run XDP without giving up segmentation and checksum offloads. veth and virtio are not among them.
const XDP_DRIVERS: &[&str] = &["bnxt_en", "i40e", "ice", "igb", "igc", "ixgbe", "mlx5_core"];

/// Drivers of devices that wrap packets and hand them on: what they carry came in on another uplink, where XDP is.
const TUNNEL_DRIVERS: &[&str] = &["bareudp", "geneve", "gre", "ip6_gre", "ip6tnl", "ipip", "tun", "vxlan"];

/// What went wrong at one hook.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// On an interface.
    #[error("cannot attach {program} to {interface}: {source}{}", hint(.source))]
    Interface {
        /// The program.
        program: &'static str,
        /// The interface's name.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// On the cgroup.
    #[error("cannot attach {program} to the cgroup {cgroup}: {source}{}", hint(.source))]
    Socket {
        /// The program.
        program: &'static str,
        /// The cgroup's folder.
        cgroup: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A program that is not loaded.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The pin folder.
    #[error(transparent)]
    Pins(#[from] PinError),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => ". Another XDP program is there: remove it, or use --xdp=off",
        Some(libc::EPERM) => ". Is CAP_NET_ADMIN missing?",
        Some(libc::EOPNOTSUPP) => ". The driver cannot do it: use --xdp=auto or --xdp=off",
        _ => "",
    }
}

impl AttachError {
    /// Whether the interface is merely gone, which netlink will tell.
    fn is_gone(&self) -> bool {
        match self {
            Self::Interface { source, .. } => source.raw_os_error() == Some(libc::ENODEV),
            Self::Socket { .. } | Self::Object(_) | Self::Pins(_) => false,
        }
    }
}

/// What is attached where.
#[derive(Debug)]
pub struct Attachments {
    object: Object,
    pins: Pins,
    tcx: bool,
    xdp: XdpMode,
    attached: BTreeSet<(Hook, u32)>,
    sockets: Vec<SocketHook>,
}

impl Attachments {
    /// Nothing yet; with the programs of `object`, of which all but the rare ones are loaded here.
    ///
    /// # Errors
    /// If a program cannot be loaded.
    pub fn new(
        mut object: Object,
        pins: Pins,
        features: &Features,
        xdp: XdpMode,
        sockets: SocketLb,
    ) -> Result<Self, ObjectError> {
        let needed = |hook: &Hook| !hook.is_rare() && (*hook != Hook::XdpUplink || xdp != XdpMode::Off);
        let mut programs: Vec<_> = Hook::ALL.into_iter().filter(needed).map(Hook::program).collect();
        if sockets != SocketLb::Off {
            programs.extend(SOCKET_HOOKS.iter().map(|hook| hook.program));
        }
        programs.into_iter().try_for_each(|program| object.load(program))?;
        Ok(Self { object, pins, tcx: features.tcx, xdp, attached: BTreeSet::new(), sockets: Vec::new() })
    }

    /// The programs that are loaded: the rare ones follow when an interface wants them.
    pub fn programs(&self) -> Programs {
        self.object.programs()
    }

    /// All is attached for the first time: what the programs before these wrote is carried over.
    pub fn settled(&mut self) {
        self.object.carry_over(&self.pins);
    }

    /// Attaches the socket hooks to the cgroup; without one, removes them.
    pub fn sockets(&mut self, cgroup: Option<&Cgroup>) -> Vec<AttachError> {
        let mut errors = Vec::new();
        for hook in SOCKET_HOOKS {
            let result = match cgroup {
                Some(cgroup) => self.socket(&hook, cgroup),
                None => self.pins.remove(&self.pins.socket_link(hook.program)).map_err(AttachError::from),
            };
            errors.extend(result.err());
        }
        errors
    }

    fn socket(&mut self, hook: &SocketHook, cgroup: &Cgroup) -> Result<(), AttachError> {
        let failed =
            |source| AttachError::Socket { program: hook.program, cgroup: cgroup.path.clone(), source };
        let program = self.object.program(hook.program)?;
        let pin = self.pins.socket_link(hook.program);
        let pinned = open(&self.pins, &pin, failed)?;
        let same =
            |link: &Link| matches!(link.state(), Ok(state) if state.target == Target::Cgroup(cgroup.id));
        match pinned {
            Some(link) if same(&link) => link.update(program).map_err(failed)?,
            Some(_) => {
                // Another cgroup than before: the new link first, then its pin in the place of the old one.
                let new = self.pins.socket_link(&format!("{}-new", hook.program));
                self.pins.remove(&new)?;
                let link =
                    Link::to_cgroup(program, cgroup.folder.as_fd(), hook.attach_type).map_err(failed)?;
                link.pin(&new).map_err(failed)?;
                std::fs::rename(&new, &pin).map_err(failed)?;
            }
            None => {
                let link =
                    Link::to_cgroup(program, cgroup.folder.as_fd(), hook.attach_type).map_err(failed)?;
                link.pin(&pin).map_err(failed)?;
            }
        }
        if !self.sockets.contains(hook) {
            self.sockets.push(*hook);
        }
        Ok(())
    }

    /// Attaches what these interfaces want and is not there, then removes what nobody wants.
    pub fn interfaces(&mut self, interfaces: &Interfaces, roles: &BTreeMap<u32, Role>) -> Vec<AttachError> {
        let mut errors = Vec::new();
        let mut wanted = BTreeSet::new();
        for (&index, &role) in roles {
            let Some(interface) = interfaces.links.get(&index) else { continue };
            for hook in Hook::of(role, interface.ethernet) {
                wanted.insert((hook, index));
                let name = interface.name.as_str();
                errors.extend(self.ensure(hook, index, name, |this| this.tc(hook, index, name)).err());
            }
            if role == Role::Uplink
                && interface.ethernet
                && let Some(mode) = self.xdp_mode(&interface.name)
            {
                wanted.insert((Hook::XdpUplink, index));
                let name = interface.name.as_str();
                let result = self.ensure(Hook::XdpUplink, index, name, |this| this.xdp(index, name, mode));
                errors.extend(result.err());
            }
        }
        errors.extend(self.remove_unwanted(&wanted).err());
        errors.retain(|error| !error.is_gone());
        errors
    }

    fn ensure(
        &mut self,
        hook: Hook,
        index: u32,
        name: &str,
        attach: impl FnOnce(&mut Self) -> Result<(), AttachError>,
    ) -> Result<(), AttachError> {
        if self.attached.contains(&(hook, index)) {
            return Ok(());
        }
        attach(self)?;
        self.attached.insert((hook, index));
        tracing::debug!("attached {} to {name} ({index})", hook.program());
        Ok(())
    }

    fn tc(&mut self, hook: Hook, index: u32, name: &str) -> Result<(), AttachError> {
        let failed = interface_error(hook, name);
        self.object.load(hook.program())?;
        if !self.tcx {
            let program = self.object.classifier(hook.program())?;
            return clsact::attach(program, name, hook.is_egress()).map_err(failed);
        }
        let (attach_type, order) = link::tcx(hook.is_egress());
        self.link(hook, index, name, Target::Tcx(index), attach_type, order)
    }

    fn xdp(&mut self, index: u32, name: &str, mode: u32) -> Result<(), AttachError> {
        self.link(Hook::XdpUplink, index, name, Target::Xdp(index), link::XDP, mode)
    }

    /// The mode of XDP on this uplink, which has Ethernet headers; `None` where tc does the work.
    fn xdp_mode(&self, name: &str) -> Option<u32> {
        let tunnel = || probe::driver(name).is_ok_and(|driver| TUNNEL_DRIVERS.contains(&driver.as_str()));
        match self.xdp {
            XdpMode::Off => None,
            XdpMode::Native | XdpMode::Generic if tunnel() => None,
            XdpMode::Native => Some(XDP_NATIVE),
            XdpMode::Generic => Some(XDP_GENERIC),
            XdpMode::Auto => {
                let driver = probe::driver(name).ok()?;
                XDP_DRIVERS.contains(&driver.as_str()).then_some(XDP_NATIVE)
            }
        }
    }

    /// Gives the pinned link the new program; without one, or if what it was attached to is gone, makes a new one.
    fn link(
        &mut self,
        hook: Hook,
        index: u32,
        name: &str,
        target: Target,
        attach_type: u32,
        flags: u32,
    ) -> Result<(), AttachError> {
        let failed = interface_error(hook, name);
        let program = self.object.program(hook.program())?;
        let pin = self.pins.link(hook.program(), index);
        if let Some(link) = open(&self.pins, &pin, &failed)? {
            let state = link.state().map_err(&failed)?;
            if state.target == target {
                return link.update(program).map_err(failed);
            }
            // An interface that is gone, whose index another one has now.
            self.pins.remove(&pin)?;
        }
        let link = Link::to_interface(program, index, attach_type, flags).map_err(&failed)?;
        link.pin(&pin).map_err(failed)
    }

    fn remove_unwanted(&mut self, wanted: &BTreeSet<(Hook, u32)>) -> Result<(), AttachError> {
        for name in self.pins.pinned_links()? {
            if let Some(at) = parse(&name)
                && !wanted.contains(&at)
            {
                self.pins.remove(&self.pins.links().join(&name))?;
                tracing::debug!("removed the pin {name}");
            }
        }
        self.attached.retain(|at| wanted.contains(at));
        Ok(())
    }

    /// Names what should be attached and is not any more (H2), and forgets it, so that it is attached again.
    pub fn lost(&mut self) -> Vec<String> {
        let mut lost = Vec::new();
        let (pins, object, tcx) = (&self.pins, &self.object, self.tcx);
        self.attached.retain(|(hook, index)| {
            let there = if tcx || *hook == Hook::XdpUplink {
                is_attached(object, &pins.link(hook.program(), *index), hook.program())
            } else {
                // What cannot be known is not reported.
                clsact::is_attached(*index, hook.is_egress()).unwrap_or(true)
            };
            if !there {
                lost.push(format!("{}-{index}", hook.program()));
            }
            there
        });
        for hook in &self.sockets {
            if !is_attached(&self.object, &self.pins.socket_link(hook.program), hook.program) {
                lost.push(hook.program.to_owned());
            }
        }
        lost
    }
}

fn interface_error(hook: Hook, name: &str) -> impl Fn(io::Error) -> AttachError {
    let interface = name.to_owned();
    move |source| AttachError::Interface { program: hook.program(), interface: interface.clone(), source }
}

/// Opens a pinned link. What is pinned there and is no link is removed: nothing else may be in the folder.
fn open(
    pins: &Pins,
    pin: &Path,
    failed: impl Fn(io::Error) -> AttachError,
) -> Result<Option<Link>, AttachError> {
    let link = Link::open(pin).map_err(&failed)?;
    match link.as_ref().map(Link::state) {
        Some(Err(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
            pins.remove(pin)?;
            Ok(None)
        }
        Some(Err(error)) => Err(failed(error)),
        Some(Ok(state)) if state.target.is_gone() => {
            pins.remove(pin)?;
            Ok(None)
        }
        Some(Ok(_)) | None => Ok(link),
    }
}

fn is_attached(object: &Object, pin: &Path, program: &str) -> bool {
    let Ok((id, _)) = object.program_id(program) else { return false };
    matches!(
        Link::open(pin).ok().flatten().and_then(|link| link.state().ok()),
        Some(state) if state.program == id && !state.target.is_gone()
    )
}

/// Hook and interface of a pin's name.
fn parse(name: &str) -> Option<(Hook, u32)> {
    let (program, index) = name.rsplit_once('-')?;
    let hook = Hook::ALL.into_iter().find(|hook| hook.program() == program)?;
    Some((hook, index.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_s_name_tells_hook_and_interface() {
        assert_eq!(parse("tc_pod_in-12"), Some((Hook::PodIn, 12)));
        assert_eq!(parse("xdp_uplink-3"), Some((Hook::XdpUplink, 3)));
        assert_eq!(parse("connect4"), None);
        assert_eq!(parse("tc_pod_in-x"), None);
    }
}
