//! tc programs on kernels without TCX: filters of the clsact qdisc, found again by a fixed priority and handle.
//!
//! A filter has no link, so it stays by itself when the process ends, and is replaced in place.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "aya's errors are not ours and name much that cannot happen here"
)]

use super::netlink;
use aya::programs::links::Link as _;
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, tc};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkPayload};
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption};
use std::io;

/// The handle of all filters of this agent: "PL".
const HANDLE: TcHandle = TcHandle::new(0, 0x504c);
/// The same as netlink has it.
const HANDLE_NUMBER: u32 = 0x504c;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)` and `TC_H_MIN_EGRESS` of linux/pkt_sched.h.
const PARENT_IN: u32 = 0xffff_fff2;
const PARENT_OUT: u32 = 0xffff_fff3;
/// On ingress before everybody else's, so that they see what the pods see.
const INGRESS_PRIORITY: u16 = 1;
/// On egress behind everybody else's.
const EGRESS_PRIORITY: u16 = 0xbfff;

const fn place(egress: bool) -> (TcAttachType, u16) {
    if egress { (TcAttachType::Egress, EGRESS_PRIORITY) } else { (TcAttachType::Ingress, INGRESS_PRIORITY) }
}

/// Puts the program on the interface, in place of its predecessor if there is one.
///
/// # Errors
/// The kernel's.
pub(super) fn attach(program: &mut SchedClassifier, interface: &str, egress: bool) -> io::Result<()> {
    let (direction, priority) = place(egress);
    let predecessor = SchedClassifierLink::attached(interface, direction, priority, HANDLE, None)?;
    let link = match program.attach_to_link(predecessor) {
        Ok(link) => link,
        Err(_) => {
            match tc::qdisc_add_clsact(interface) {
                Err(error) if errno(&error) != Some(libc::EEXIST) => return Err(io_error(error)),
                Ok(()) | Err(_) => {}
            }
            let options = NlOptions { priority, handle: HANDLE, classid: None };
            program
                .attach_with_options(interface, direction, TcAttachOptions::Netlink(options))
                .map_err(program_error)?
        }
    };
    // The filter stays when this process ends; dropping the link would remove it.
    std::mem::forget(program.take_link(link).map_err(program_error)?);
    Ok(())
}

/// Whether the filter is on the interface with this index, and runs the program with this id (H2). An interface that is gone
/// has lost nothing.
///
/// # Errors
/// If netlink does not answer.
pub(super) fn is_attached(index: u32, egress: bool, program: u32) -> io::Result<bool> {
    let netlink = netlink::connect(NETLINK_ROUTE)?;
    let mut request = TcMessage::with_index(index.try_into().map_err(io::Error::other)?);
    request.header.parent = if egress { PARENT_OUT } else { PARENT_IN }.into();
    netlink::send(&netlink, NLM_F_REQUEST | NLM_F_DUMP, RouteNetlinkMessage::GetTrafficFilter(request))?;
    let (_, priority) = place(egress);
    let mut found = false;
    loop {
        for message in netlink::receive::<RouteNetlinkMessage>(&netlink)? {
            match message {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(filter)) => {
                    // The priority is the upper half of this word, the protocol the lower.
                    found |= u32::from(filter.header.handle) == HANDLE_NUMBER
                        && filter.header.info >> 16 == u32::from(priority)
                        && runs(&filter, program);
                }
                NetlinkPayload::Error(error) if error.to_io().raw_os_error() == Some(libc::ENODEV) => {
                    return Ok(true);
                }
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::Done(_) => return Ok(found),
                _ => {}
            }
        }
    }
}

/// Whether a filter runs the program with this id.
fn runs(filter: &TcMessage, program: u32) -> bool {
    let wanted = TcOption::Bpf(TcFilterBpfOption::ProgId(program));
    filter.attributes.iter().any(|attribute| match attribute {
        TcAttribute::Options(options) => options.contains(&wanted),
        _ => false,
    })
}

/// Removes both filters of an interface; says which there were.
pub(super) fn detach(interface: &str) -> Vec<&'static str> {
    let removed = |egress| {
        let (direction, priority) = place(egress);
        let link = SchedClassifierLink::attached(interface, direction, priority, HANDLE, None);
        link.is_ok_and(|link| link.detach().is_ok())
    };
    let names = [(false, "ingress"), (true, "egress")];
    names.into_iter().filter(|(egress, _)| removed(*egress)).map(|(_, name)| name).collect()
}

fn errno(error: &TcError) -> Option<i32> {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error(),
        TcError::IoError(error) => error.raw_os_error(),
        _ => None,
    }
}

fn io_error(error: TcError) -> io::Error {
    errno(&error).map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
}

fn program_error(error: ProgramError) -> io::Error {
    match error {
        ProgramError::TcError(error) => io_error(error),
        ProgramError::NetlinkError(error) => {
            let errno = error.raw_os_error();
            errno.map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)
        }
        error => io::Error::other(error.to_string()),
    }
}
