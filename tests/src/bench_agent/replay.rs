//! An API server that only tells what was recorded: lists, in pages or as streams, and one watch of EndpointSlices that the
//! benchmark feeds. It knows no objects, only texts.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What there is of one kind.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    /// The last part of its path.
    pub(super) plural: &'static str,
    /// `kind` of the list.
    pub(super) kind: &'static str,
    /// `apiVersion` of the list.
    pub(super) version: &'static str,
    /// The objects as texts.
    pub(super) items: Vec<String>,
}

/// The kind whose watch is fed.
const FED: &str = "endpointslices";

/// A running server; it ends with the process.
pub(super) struct Replay {
    address: SocketAddr,
    watches: Receiver<TcpStream>,
}

/// Serves on a listener that was bound where the agent can reach it.
pub(super) fn serve(listener: TcpListener, listed: Vec<Listed>) -> Result<Replay> {
    let address = listener.local_addr()?;
    let (sender, watches) = mpsc::channel();
    let sender = Arc::new(Mutex::new(sender));
    let listed: Arc<BTreeMap<&'static str, Listed>> =
        Arc::new(listed.into_iter().map(|list| (list.plural, list)).collect());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (listed, sender) = (listed.clone(), sender.clone());
            // A client that goes away ends its connection, and nothing else.
            std::thread::spawn(move || drop(converse(stream, &listed, &sender)));
        }
    });
    Ok(Replay { address, watches })
}

impl Replay {
    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The newest watch of EndpointSlices: what is written there with [`event`] is an event.
    pub(super) fn watch(&self, timeout: Duration) -> Result<TcpStream> {
        let mut watch = self.watches.recv_timeout(timeout).context("nobody watches EndpointSlices")?;
        while let Ok(newer) = self.watches.try_recv() {
            watch = newer;
        }
        Ok(watch)
    }
}

/// A changed object as one chunk of a watch.
pub(super) fn event(object: &str) -> Vec<u8> {
    chunk("MODIFIED", object)
}

fn chunk(word: &str, object: &str) -> Vec<u8> {
    let line = format!("{{\"type\":\"{word}\",\"object\":{object}}}\n");
    format!("{:x}\r\n{line}\r\n", line.len()).into_bytes()
}

/// All objects as the beginning of a watch, and the bookmark that ends them.
fn stream_list(writer: &mut TcpStream, list: &Listed) -> Result<()> {
    let mut writer = std::io::BufWriter::new(writer);
    for item in &list.items {
        writer.write_all(&chunk("ADDED", item))?;
    }
    let (kind, version) = (list.kind.trim_end_matches("List"), list.version);
    let metadata = r#"{"resourceVersion":"1","annotations":{"k8s.io/initial-events-end":"true"}}"#;
    let bookmark = format!(r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{metadata}}}"#);
    writer.write_all(&chunk("BOOKMARK", &bookmark))?;
    Ok(writer.flush()?)
}

/// Requests and answers on one connection, until a watch takes it over or the client closes it.
fn converse(
    stream: TcpStream,
    listed: &BTreeMap<&'static str, Listed>,
    watches: &Mutex<Sender<TcpStream>>,
) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let Some((target, length)) = request(&mut reader)? else { return Ok(()) };
        std::io::copy(&mut std::io::Read::take(&mut reader, length), &mut std::io::sink())?;
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let plural = path.rsplit('/').next().unwrap_or_default();
        let Some(list) = listed.get(plural) else {
            answer(
                &mut writer,
                "404 Not Found",
                "{\"kind\":\"Status\",\"status\":\"Failure\",\"code\":404}",
            )?;
            continue;
        };
        if query.split('&').any(|part| part == "watch=true" || part == "watch=1") {
            writer.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )?;
            if query.split('&').any(|part| part == "sendInitialEvents=true") {
                stream_list(&mut writer, list)?;
            }
            if plural == FED {
                let watches = watches.lock().unwrap_or_else(PoisonError::into_inner);
                watches.send(writer.try_clone()?)?;
            }
            // The connection lasts as long as the client likes.
            while request(&mut reader)?.is_some() {}
            return Ok(());
        }
        answer(&mut writer, "200 OK", &page(list, query))?;
    }
}

/// The target of the next request and the length of its body; `None` at the end.
fn request(reader: &mut impl BufRead) -> Result<Option<(String, u64)>> {
    let (mut target, mut length, mut line) = (None, 0, String::new());
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let text = line.trim_end();
        if text.is_empty() {
            return Ok(target.map(|target| (target, length)));
        }
        if target.is_none() {
            target = Some(text.split(' ').nth(1).unwrap_or_default().to_owned());
        } else if let Some((name, value)) = text.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
}

fn answer(writer: &mut TcpStream, status: &str, body: &str) -> Result<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    writer.write_all(head.as_bytes())?;
    Ok(writer.write_all(body.as_bytes())?)
}

/// As many objects as the query asks for, from where it says.
fn page(list: &Listed, query: &str) -> String {
    let parameter = |name: &str| -> Option<usize> {
        let value = query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))?;
        value.parse().ok()
    };
    let from = parameter("continue").unwrap_or(0).min(list.items.len());
    let until = (from + parameter("limit").unwrap_or(usize::MAX).min(list.items.len())).min(list.items.len());
    let token = if until < list.items.len() { format!(",\"continue\":\"{until}\"") } else { String::new() };
    format!(
        "{{\"kind\":\"{}\",\"apiVersion\":\"{}\",\"metadata\":{{\"resourceVersion\":\"1\"{token}}},\"items\":[{}]}}",
        list.kind,
        list.version,
        list.items[from..until].join(",")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_given_in_pages() {
        let items = ["1", "2", "3"].map(str::to_owned).to_vec();
        let list = Listed { plural: "services", kind: "ServiceList", version: "v1", items };
        let of = |query: &str| serde_json::from_str::<serde_json::Value>(&page(&list, query)).unwrap();
        let first = of("limit=2&labelSelector=x");
        assert_eq!(first["items"], serde_json::json!([1, 2]));
        assert_eq!(first["metadata"]["continue"], "2");
        let second = of("limit=2&continue=2");
        assert_eq!(second["items"], serde_json::json!([3]));
        assert!(second["metadata"]["continue"].is_null());
        assert_eq!(of("")["items"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn an_event_is_one_chunk() {
        let text = String::from_utf8(event("{}")).unwrap();
        assert_eq!(text, "20\r\n{\"type\":\"MODIFIED\",\"object\":{}}\n\r\n");
    }
}
