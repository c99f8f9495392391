//! Attaching: each program at its hooks, each link pinned, so that the end of this process touches no packet (C3).
//!
//! A link that is pinned already gets the new program in its place; what is not wanted any more is removed after what is
//! wanted is there. A hook that fails is told and tried again; it never stops the others.

use super::clsact;
use super::hook::{Hook, SOCKET_HOOKS, SocketHook};
use super::link::{self, Link, Target, interface_name};
use super::links::Interfaces;
use super::object::{Object, ObjectError, Programs};
use super::pins::{PinError, Pins};
use super::probe::{Cgroup, Features};
use super::roles::Role;
use super::xdp;
use crate::config::{SocketLb, XdpMode};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

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
    #[error("cannot attach {program} to the cgroup {cgroup}: {source}{}", socket_hint(.source))]
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

fn socket_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            ". Is a program there that suffers no other beside it (`bpftool cgroup tree`), or is CAP_NET_ADMIN missing?"
        }
        Some(libc::E2BIG) => {
            ". So many programs are there that the kernel takes no more (`bpftool cgroup tree`)"
        }
        _ => "",
    }
}

impl AttachError {
    /// Whether nothing that comes from the network is served on an interface as long as this is so.
    pub fn is_deafening(&self) -> bool {
        let deaf =
            [Hook::UplinkIn, Hook::UplinkOut, Hook::BareUplinkIn, Hook::BareUplinkOut].map(Hook::program);
        match self {
            Self::Interface { program, .. } => deaf.contains(program),
            Self::Socket { .. } | Self::Object(_) | Self::Pins(_) => false,
        }
    }

    /// Whether the interface is merely gone, which netlink will tell.
    fn is_gone(&self) -> bool {
        match self {
            Self::Interface { source, .. } => source.raw_os_error() == Some(libc::ENODEV),
            Self::Socket { .. } | Self::Object(_) | Self::Pins(_) => false,
        }
    }
}

/// The program at a hook.
const fn program_of(hook: Hook, xdp: XdpMode) -> &'static str {
    if matches!(hook, Hook::XdpUplink) { xdp::program(xdp) } else { hook.program() }
}

/// What is attached where.
#[derive(Debug)]
pub struct Attachments {
    object: Object,
    pins: Pins,
    tcx: bool,
    xdp: XdpMode,
    /// Drivers besides those known for which `--xdp auto` means native.
    xdp_drivers: Vec<String>,
    attached: BTreeSet<(Hook, u32)>,
    /// The programs that are attached to the cgroup.
    sockets: BTreeSet<&'static str>,
    /// Uplinks whose driver refused XDP, or that another XDP program has (`--xdp auto`).
    without_xdp: BTreeSet<u32>,
    /// The interfaces were looked through for what an earlier agent left.
    swept: bool,
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
        let hooks = Hook::ALL.into_iter().filter(needed);
        let mut programs: Vec<_> = hooks.map(|hook| program_of(hook, xdp)).collect();
        if sockets != SocketLb::Off {
            programs.extend(SOCKET_HOOKS.iter().map(|hook| hook.program));
        }
        programs.into_iter().try_for_each(|program| object.load(program))?;
        Ok(Self {
            object,
            pins,
            tcx: features.tcx,
            xdp,
            xdp_drivers: Vec::new(),
            attached: BTreeSet::new(),
            sockets: BTreeSet::new(),
            without_xdp: BTreeSet::new(),
            swept: false,
        })
    }

    /// Names further drivers for which `--xdp auto` means native.
    #[must_use]
    pub fn with_xdp_drivers(self, xdp_drivers: Vec<String>) -> Self {
        Self { xdp_drivers, ..self }
    }

    /// The programs that are loaded: the rare ones follow when an interface wants them.
    pub fn programs(&self) -> Programs {
        self.object.programs()
    }

    /// All is attached for the first time: what the programs before these wrote is carried over.
    pub fn settled(&mut self) {
        self.object.carry_over(&self.pins);
    }

    /// Whether what leaves by the interface with this index meets a program.
    pub fn takes_what_leaves(&self, index: u32) -> bool {
        [Hook::UplinkOut, Hook::BareUplinkOut].iter().any(|&hook| self.attached.contains(&(hook, index)))
    }

    /// Attaches the socket hooks that are missing to the cgroup; without one, removes them all.
    pub fn sockets(&mut self, cgroup: Option<&Cgroup>) -> Vec<AttachError> {
        let mut errors = Vec::new();
        for hook in &SOCKET_HOOKS {
            if self.sockets.contains(hook.program) {
                continue;
            }
            let result = match cgroup {
                Some(cgroup) => self.socket(hook, cgroup),
                None => self.pins.remove(&self.pins.socket_link(hook.program)).map_err(AttachError::from),
            };
            match result {
                Ok(()) if cgroup.is_some() => drop(self.sockets.insert(hook.program)),
                Ok(()) => {}
                Err(error) => errors.push(error),
            }
        }
        errors
    }

    fn socket(&self, hook: &SocketHook, cgroup: &Cgroup) -> Result<(), AttachError> {
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
        Ok(())
    }

    /// Attaches what these interfaces want and is not there, then removes what nobody wants.
    pub fn interfaces(&mut self, interfaces: &Interfaces, roles: &BTreeMap<u32, Role>) -> Vec<AttachError> {
        let mut errors = Vec::new();
        let mut wanted = BTreeSet::new();
        for (&index, &role) in roles {
            let Some(interface) = interfaces.links.get(&index) else { continue };
            for hook in Hook::of(role, interface.is_ethernet()) {
                wanted.insert((hook, index));
                let name = interface.name.as_str();
                errors.extend(self.ensure(hook, index, name, |this| this.tc(hook, index, name)).err());
            }
            if role == Role::Uplink && interface.is_ethernet() {
                errors.extend(self.ensure_xdp(index, &interface.name, &mut wanted).err());
            }
        }
        self.remove_filters(interfaces, roles, &wanted);
        errors.extend(self.remove_unwanted(&wanted).err());
        self.without_xdp.retain(|index| interfaces.links.contains_key(index));
        errors.retain(|error| !error.is_gone());
        errors
    }

    /// XDP on an uplink that may have it. With `--xdp auto` a refusal means that tc does the work: it is said once, and not tried
    /// again as long as the interface lives, for a driver may stop the device while it tries.
    fn ensure_xdp(
        &mut self,
        index: u32,
        name: &str,
        wanted: &mut BTreeSet<(Hook, u32)>,
    ) -> Result<(), AttachError> {
        if self.without_xdp.contains(&index) {
            return Ok(());
        }
        let Some(mode) = xdp::mode(self.xdp, name, &self.xdp_drivers) else { return Ok(()) };
        match self.ensure(Hook::XdpUplink, index, name, |this| this.link_xdp(index, name, mode)) {
            Err(error) if self.xdp == XdpMode::Auto && !error.is_gone() => {
                tracing::warn!("no XDP on {name}, tc does its work: {error}");
                self.without_xdp.insert(index);
                Ok(())
            }
            result => {
                wanted.insert((Hook::XdpUplink, index));
                result
            }
        }
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

    /// A link keeps its mode for life. One of another mode goes first, for the kernel suffers no two: tc does the work meanwhile.
    fn link_xdp(&mut self, index: u32, name: &str, mode: u32) -> Result<(), AttachError> {
        let failed = interface_error(Hook::XdpUplink, name);
        let pin = self.pins.link(Hook::XdpUplink.program(), index);
        if let Some(link) = open(&self.pins, &pin, &failed)? {
            let program = link.state().map_err(&failed)?.program;
            // If nobody says how it runs, it stays as it is.
            if xdp::mode_of(index, program).ok().flatten().is_some_and(|before| before != mode) {
                self.pins.remove(&pin)?;
            }
        }
        self.link(Hook::XdpUplink, index, name, Target::Xdp(index), link::XDP, mode)
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
        let program = self.object.program(program_of(hook, self.xdp))?;
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

    /// Links of interfaces that lost their role, and what a version left whose programs had other names.
    fn remove_unwanted(&mut self, wanted: &BTreeSet<(Hook, u32)>) -> Result<(), AttachError> {
        for name in self.pins.pinned_links()? {
            let is_wanted = match parse(&name) {
                Some(at) => wanted.contains(&at),
                None => SOCKET_HOOKS.iter().any(|hook| hook.program == name),
            };
            if !is_wanted {
                self.pins.remove(&self.pins.links().join(&name))?;
                tracing::debug!("removed the pin {name}");
            }
        }
        self.attached.retain(|at| wanted.contains(at));
        Ok(())
    }

    /// clsact filters of interfaces that lost their role: nothing else would ever take them away. The first time, all
    /// interfaces are looked at that have none, for they may have had one when an earlier agent ran.
    fn remove_filters(
        &mut self,
        interfaces: &Interfaces,
        roles: &BTreeMap<u32, Role>,
        wanted: &BTreeSet<(Hook, u32)>,
    ) {
        if self.tcx {
            return;
        }
        let first = !std::mem::replace(&mut self.swept, true);
        let dropped: BTreeSet<u32> = match first {
            true => interfaces.links.keys().copied().filter(|index| !roles.contains_key(index)).collect(),
            false => self.attached.difference(wanted).map(|(_, index)| *index).collect(),
        };
        for (index, interface) in interfaces.links.iter().filter(|(index, _)| dropped.contains(index)) {
            // One whose role is another now has that one's programs in the same place.
            let gone = if roles.contains_key(index) { Vec::new() } else { clsact::detach(&interface.name) };
            for direction in gone {
                tracing::info!(
                    "removed the {direction} filter from {}, which is no uplink and no pod's any more",
                    interface.name
                );
            }
        }
    }

    /// Names what somebody detached (H2), and forgets all that is not attached any more, so that it is attached again. An
    /// interface that went took its programs with it: that is no loss.
    pub fn lost(&mut self) -> Vec<String> {
        let mut lost = Vec::new();
        let (pins, object, tcx, xdp) = (&self.pins, &self.object, self.tcx, self.xdp);
        self.attached.retain(|(hook, index)| {
            let there = if tcx || *hook == Hook::XdpUplink {
                is_attached(object, &pins.link(hook.program(), *index), program_of(*hook, xdp))
            } else {
                has_filter(object, *hook, *index)
            };
            if !there && let Some(interface) = interface_name(*index) {
                lost.push(format!("{} of {interface}", hook.program()));
            }
            there
        });
        self.sockets.retain(|program| {
            let there = is_attached(object, &pins.socket_link(program), program);
            if !there {
                lost.push((*program).to_owned());
            }
            there
        });
        lost
    }
}

/// Whether the interface has the filter, with this agent's program. What cannot be known is not reported.
fn has_filter(object: &Object, hook: Hook, index: u32) -> bool {
    let Ok((program, _)) = object.program_id(hook.program()) else { return true };
    clsact::is_attached(index, hook.is_egress(), program).unwrap_or(true)
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

/// Whether the link that is pinned there runs this agent's program. What cannot be known is not reported.
fn is_attached(object: &Object, pin: &Path, program: &str) -> bool {
    let (Ok((id, _)), Ok(link)) = (object.program_id(program), Link::open(pin)) else { return true };
    match link.map(|link| link.state()) {
        None => false,
        Some(Ok(state)) => state.program == id && !state.target.is_gone(),
        // Something else is pinned there.
        Some(Err(error)) => error.raw_os_error() != Some(libc::EINVAL),
    }
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
