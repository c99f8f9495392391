//! How a snapshot is written: a line of JSON that says whose it is, one for each object, and one with the checksum of all
//! bytes before it. People can read it; both ends stream.

use crate::model::{EndpointSlice, Object, Service, Shared};
use crate::watch::names::Names;
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The version of the format, which is also that of [`model`](crate::model)'s types: an old snapshot is worth less than a
/// wrong one costs, so there is no reader for any other.
pub const VERSION: u32 = 2;
/// Longer than any line that was ever written.
const LONGEST_LINE: u64 = 64 << 20;
/// How much is read at once.
const BLOCK: usize = 64 << 10;

/// Whose objects these are: they are of no use to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Name of the node.
    pub node: Arc<str>,
    /// `--service-proxy-name`, by which Services were chosen.
    pub proxy_name: Option<Arc<str>>,
}

/// Why a snapshot is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A byte is not as it was written, or bytes are missing.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// Another format.
    #[error("it is of format {0}, and this is a build for format {VERSION}")]
    OtherVersion(u64),
    /// Another node's, or that of an agent with another `--service-proxy-name`.
    #[error("it is of node \"{}\" with {}", .0.node, proxy(.0))]
    OtherOwner(Owner),
    /// Somebody else could have written it.
    #[error("{0}: only root may be able to write it")]
    Open(String),
}

fn proxy(owner: &Owner) -> String {
    match &owner.proxy_name {
        None => "no --service-proxy-name".to_owned(),
        Some(name) => format!("--service-proxy-name {name}"),
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    portolan_snapshot: u32,
    /// Seconds since 1970.
    taken: u64,
    owner: Owner,
}

/// Of a head, what every version has.
#[derive(Deserialize)]
struct AnyHead {
    portolan_snapshot: u64,
}

/// An [`Object`] that is not owned, written in the same way.
#[derive(Serialize)]
enum Line<'a> {
    Service(&'a Service),
    EndpointSlice(&'a EndpointSlice),
}

/// The last line, always of the same length.
fn trailer(checksum: u32) -> String {
    format!("{{\"crc32\":\"{checksum:08x}\"}}\n")
}

/// Adds up all that is written.
struct Summing<W> {
    to: W,
    sum: crc32fast::Hasher,
}

impl<W: Write> Write for Summing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.sum.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Writes all objects, a piece at a time.
///
/// # Errors
/// The writer's.
pub(crate) fn write(to: impl Write, owner: &Owner, taken: SystemTime, objects: &Shared) -> io::Result<()> {
    let mut to = BufWriter::with_capacity(BLOCK, Summing { to, sum: crc32fast::Hasher::new() });
    let taken = taken.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    line(&mut to, &Head { portolan_snapshot: VERSION, taken, owner: owner.clone() })?;
    for object in &objects.others {
        line(&mut to, object)?;
    }
    for service in &objects.services {
        line(&mut to, &Line::Service(service))?;
    }
    for slice in objects.slices.iter().flat_map(|slices| slices.iter()) {
        line(&mut to, &Line::EndpointSlice(slice))?;
    }
    let Summing { mut to, sum } = to.into_inner().map_err(io::IntoInnerError::into_error)?;
    to.write_all(trailer(sum.finalize()).as_bytes())
}

fn line(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *to, value)?;
    to.write_all(b"\n")
}

/// Reads all objects and says when they were taken: all of them, or none.
///
/// # Errors
/// The reader's; why the snapshot is not trusted is in the inner result.
pub(crate) fn read(
    mut from: impl Read + Seek,
    owner: &Owner,
) -> io::Result<Result<(SystemTime, Vec<Object>), Refusal>> {
    let length = from.seek(SeekFrom::End(0))?;
    let end = length.saturating_sub(trailer(0).len() as u64);
    from.rewind()?;
    let mut reader = BufReader::with_capacity(BLOCK, from);
    if let Err(refusal) = check_version(&mut reader)? {
        return Ok(Err(refusal));
    }
    reader.rewind()?;
    if let Err(refusal) = check_sum(&mut reader, end)? {
        return Ok(Err(refusal));
    }
    reader.rewind()?;
    read_lines(reader.take(end), owner)
}

/// First of all: what another version writes may be damaged in this one's eyes.
fn check_version(reader: &mut impl BufRead) -> io::Result<Result<(), Refusal>> {
    let mut first = Vec::new();
    reader.take(LONGEST_LINE).read_until(b'\n', &mut first)?;
    Ok(match serde_json::from_slice::<AnyHead>(&first) {
        Ok(head) if head.portolan_snapshot == u64::from(VERSION) => Ok(()),
        Ok(head) => Err(Refusal::OtherVersion(head.portolan_snapshot)),
        Err(error) => Err(Refusal::Damaged(format!("its first line is none of a snapshot's ({error})"))),
    })
}

fn check_sum(reader: &mut impl BufRead, end: u64) -> io::Result<Result<(), Refusal>> {
    let (mut sum, mut left) = (crc32fast::Hasher::new(), end);
    let mut block = vec![0; BLOCK];
    while left > 0 {
        let size = block.len().min(usize::try_from(left).unwrap_or(BLOCK));
        reader.read_exact(&mut block[..size])?;
        sum.update(&block[..size]);
        left -= size as u64;
    }
    let mut last = String::new();
    let is_text = reader.take(LONGEST_LINE).read_to_string(&mut last);
    let intact = is_text.is_ok() && last == trailer(sum.finalize());
    Ok(if intact { Ok(()) } else { Err(Refusal::Damaged("its checksum is another".to_owned())) })
}

fn read_lines(
    mut reader: impl BufRead,
    owner: &Owner,
) -> io::Result<Result<(SystemTime, Vec<Object>), Refusal>> {
    let damaged = |number: usize, error: &serde_json::Error| {
        Ok(Err(Refusal::Damaged(format!("line {number} cannot be read ({error})"))))
    };
    let (mut objects, mut names) = (Vec::new(), Names::default());
    let (mut text, mut taken) = (Vec::new(), None);
    for number in 1.. {
        text.clear();
        if reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut text)? == 0 {
            break;
        }
        if taken.is_none() {
            match serde_json::from_slice::<Head>(&text) {
                Ok(head) if head.owner == *owner => {
                    taken = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(head.taken));
                }
                Ok(head) => return Ok(Err(Refusal::OtherOwner(head.owner))),
                Err(error) => return damaged(number, &error),
            }
            continue;
        }
        match serde_json::from_slice(&text) {
            Ok(object) => objects.push(share_names(object, &mut names)),
            Err(error) => return damaged(number, &error),
        }
    }
    Ok(match taken {
        Some(taken) => Ok((taken, objects)),
        None => Err(Refusal::Damaged("it is empty".to_owned())),
    })
}

/// Keeps one copy of the names that thousands of objects have in common, as the watches do.
fn share_names(mut object: Object, names: &mut Names) -> Object {
    let mut share = |name: &mut Arc<str>| *name = names.get(name);
    match &mut object {
        Object::Service(service) => {
            share(&mut service.name.namespace);
            service.ports.iter_mut().for_each(|port| share(&mut port.name));
        }
        Object::EndpointSlice(slice) => {
            share(&mut slice.name.namespace);
            share(&mut slice.service.namespace);
            slice.ports.iter_mut().for_each(|port| share(&mut port.name));
            for endpoint in &mut slice.endpoints {
                endpoint.node.iter_mut().for_each(&mut share);
                endpoint.for_nodes.iter_mut().for_each(&mut share);
                endpoint.for_zones.iter_mut().for_each(&mut share);
            }
        }
        Object::Node(_) | Object::ServiceCidr { .. } => {}
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::{endpoint, ip, service, slice};
    use crate::model::{
        AddressType, Change, ChoiceAnnotations, Endpoint, LoadBalancerIngress, NameHash, Node, ObjectName,
        ServicePort, ServiceType, Store,
    };
    use dataplane_common::Protocol;
    use std::io::Cursor;

    fn owner() -> Owner {
        Owner { node: "n1".into(), proxy_name: None }
    }

    fn taken() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    /// Objects in which every field says something.
    fn objects() -> Vec<Object> {
        let range = |text: &str| vec![text.parse().unwrap()];
        let port =
            ServicePort { name: "dns".into(), protocol: Protocol::Udp, port: 53, node_port: Some(30_053) };
        let full = Service {
            uid: "u-1".into(),
            created: 86_400,
            proxy_name: Some("other".into()),
            service_type: ServiceType::LoadBalancer,
            cluster_ips: vec![ip("10.96.0.10"), ip("fd00::10")],
            external_ips: [ip("192.0.2.1")].into(),
            ingress: [LoadBalancerIngress { ip: ip("192.0.2.2"), proxy: true }].into(),
            ports: vec![port],
            internal_local: true,
            external_local: true,
            affinity_seconds: Some(10),
            source_ranges: range("10.0.0.0/8").into(),
            health_check_node_port: Some(32_000),
            choice: Some(Box::new(ChoiceAnnotations {
                algorithm: Some(("service.portolan.dev/lb-algorithm".into(), "maglev".into())),
                weights: Some(r#"{"*":2}"#.into()),
                retry: Some("1".into()),
            })),
            ..service("web")
        };
        let hinted = Endpoint {
            for_nodes: ["n1".into()].into(),
            for_zones: ["z1".into()].into(),
            ready: false,
            pod: NameHash::of("web-0"),
            zone: NameHash::of("z1"),
            ..endpoint("fd01::1", "n1")
        };
        let full_slice = EndpointSlice {
            address_type: AddressType::Ipv6,
            trigger_time: None,
            weight: Some("7".into()),
            by_controller: true,
            ..slice("web-1", "web", vec![hinted, endpoint("fd01::2", "")])
        };
        let node = Node {
            name: "n1".into(),
            zone: Some("z1".into()),
            addresses: vec![ip("192.0.2.9")],
            pod_cidrs: range("10.244.1.0/24"),
            deleting: true,
            taints: vec!["t".into()],
        };
        vec![
            Object::Node(node),
            Object::ServiceCidr { name: "kubernetes".into(), cidrs: range("10.96.0.0/16") },
            Object::Service(full),
            Object::EndpointSlice(full_slice),
            Object::EndpointSlice(slice("nobody-1", "nobody", vec![endpoint("10.0.0.1", "n2")])),
        ]
    }

    fn store(objects: &[Object]) -> Store {
        let mut store = Store::new("n1");
        for object in objects {
            store.apply(Change::Applied(object.clone()));
        }
        store
    }

    fn written(objects: &[Object]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, &owner(), taken(), &store(objects).share()).unwrap();
        bytes
    }

    fn reread(bytes: &[u8]) -> Result<(SystemTime, Vec<Object>), Refusal> {
        read(Cursor::new(bytes), &owner()).unwrap()
    }

    #[test]
    fn all_that_is_known_of_an_object_comes_back() {
        let (when, mut read) = reread(&written(&objects())).unwrap();
        let mut expected = objects();
        let name = |object: &Object| object.reference();
        read.sort_by_key(name);
        expected.sort_by_key(name);
        assert_eq!((when, read), (taken(), expected));
        assert_eq!(reread(&written(&[])).unwrap().1, []);
    }

    /// What is on disk now must be read tomorrow, or be refused as of another version: this text changes only with
    /// [`VERSION`].
    #[test]
    fn the_format_changes_only_with_its_version() {
        let text = String::from_utf8(written(&objects())).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            r#"{"portolan_snapshot":2,"taken":1800000000,"owner":{"node":"n1","proxy_name":null}}"#
        );
        let line = |start: &str| *lines.iter().find(|line| line.starts_with(start)).unwrap();
        assert_eq!(
            line(r#"{"Service""#),
            concat!(
                r#"{"Service":{"name":{"namespace":"default","name":"web"},"uid":"u-1","created":86400,"#,
                r#""proxy_name":"other","service_type":"LoadBalancer","cluster_ips":["10.96.0.10","fd00::10"],"#,
                r#""external_ips":["192.0.2.1"],"ingress":[{"ip":"192.0.2.2","proxy":true}],"#,
                r#""ports":[{"name":"dns","protocol":17,"port":53,"node_port":30053}],"internal_local":true,"#,
                r#""external_local":true,"affinity_seconds":10,"source_ranges":["10.0.0.0/8"],"#,
                r#""health_check_node_port":32000,"choice":{"algorithm":["service.portolan.dev/lb-algorithm","maglev"],"#,
                r#""weights":"{\"*\":2}","retry":"1"}}}"#
            )
        );
        assert_eq!(
            line(r#"{"EndpointSlice":{"name":{"namespace":"default","name":"web-1"}"#),
            concat!(
                r#"{"EndpointSlice":{"name":{"namespace":"default","name":"web-1"},"#,
                r#""service":{"namespace":"default","name":"web"},"address_type":"Ipv6","#,
                r#""ports":[{"name":"","protocol":6,"port":8080}],"#,
                r#""endpoints":[{"address":"fd01::1","node":"n1","ready":false,"serving":true,"#,
                r#""terminating":false,"for_nodes":["n1"],"for_zones":["z1"],"#,
                r#""pod":10448768565045221067,"zone":12482430636619478283},"#,
                r#"{"address":"fd01::2","node":null,"ready":true,"serving":true,"terminating":false,"#,
                r#""for_nodes":[],"for_zones":[],"pod":0,"zone":0}],"trigger_time":null,"weight":"7","#,
                r#""by_controller":true}}"#
            )
        );
        assert_eq!(
            line(r#"{"Node""#),
            concat!(
                r#"{"Node":{"name":"n1","zone":"z1","addresses":["192.0.2.9"],"#,
                r#""pod_cidrs":["10.244.1.0/24"],"deleting":true,"taints":["t"]}}"#
            )
        );
        assert_eq!(
            line(r#"{"ServiceCidr""#),
            r#"{"ServiceCidr":{"name":"kubernetes","cidrs":["10.96.0.0/16"]}}"#
        );
    }

    #[test]
    fn no_byte_can_change_unnoticed() {
        let good = written(&objects());
        for at in 0..good.len() {
            for change in [0x01, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= change;
                assert!(reread(&bad).is_err(), "byte {at} of {} with {change:#x}", good.len());
            }
        }
    }

    #[test]
    fn nothing_can_be_cut_off_added_or_left_out_unnoticed() {
        let good = written(&objects());
        for length in 0..good.len() {
            assert!(matches!(reread(&good[..length]), Err(Refusal::Damaged(_))), "cut to {length}");
        }
        assert!(matches!(reread(&[&good[..], b"\n"].concat()), Err(Refusal::Damaged(_))));
        assert!(matches!(reread(&[&good[..], &good[..]].concat()), Err(Refusal::Damaged(_))));
        let lines: Vec<_> = good.split_inclusive(|byte| *byte == b'\n').collect();
        for at in 0..lines.len() {
            let without: Vec<_> = lines
                .iter()
                .enumerate()
                .filter(|(line, _)| *line != at)
                .flat_map(|(_, line)| *line)
                .collect();
            let bytes: Vec<u8> = without.into_iter().copied().collect();
            assert!(matches!(reread(&bytes), Err(Refusal::Damaged(_))), "without line {at}");
        }
        let zeros = vec![0; good.len()];
        assert!(matches!(reread(&zeros), Err(Refusal::Damaged(_))), "as a crash leaves it on some disks");
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let text = String::from_utf8(written(&objects())).unwrap();
        let newer = text.replacen("\"portolan_snapshot\":2,", "\"portolan_snapshot\":3,\"new\":[],", 1);
        assert_eq!(reread(newer.as_bytes()), Err(Refusal::OtherVersion(3)));
    }

    #[test]
    fn another_node_s_snapshot_is_refused() {
        let bytes = written(&objects());
        let other_node = Owner { node: "n2".into(), ..owner() };
        let other_proxy = Owner { proxy_name: Some("x".into()), ..owner() };
        for other in [other_node, other_proxy] {
            assert_eq!(read(Cursor::new(&bytes), &other).unwrap(), Err(Refusal::OtherOwner(owner())));
        }
    }

    #[test]
    fn names_in_common_are_kept_once() {
        let slices = ["a", "b"].map(|name| slice(name, "web", vec![endpoint("10.0.0.1", "node-1")]));
        let (_, read) = reread(&written(&slices.map(Object::EndpointSlice))).unwrap();
        let nodes: Vec<_> = read
            .iter()
            .map(|object| match object {
                Object::EndpointSlice(slice) => slice.endpoints[0].node.clone().unwrap(),
                Object::Service(_) | Object::Node(_) | Object::ServiceCidr { .. } => unreachable!(),
            })
            .collect();
        assert!(Arc::ptr_eq(&nodes[0], &nodes[1]));
        assert_eq!(read[0].reference().name, ObjectName::new("default", "a"));
    }
}
