//! What goes wrong between the agent and the API server, and what to check.

use crate::causes::causes;
use kube::Error;
use kube::core::Status;
use std::fmt;

/// What was being done.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    List,
    Watch,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Watch => "watch",
        }
    }
}

/// How a watch goes on that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// From where it was, for as long as it takes: the server is away, or has too much to do.
    Resume,
    /// From where it was, but not again and again: what the server has after that version may be what it stumbles over.
    ResumeOrList,
    /// By a list: the server cannot go on from there.
    List,
}

/// Something that failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// The HTTP status; 0 if there was no answer.
    pub(super) code: u16,
    /// What it means for a watch.
    pub(super) remedy: Remedy,
    /// Whether the server does not take these credentials, or they do not fit the server.
    pub(super) is_about_credentials: bool,
    /// What was being done, such as `list services`.
    pub(super) action: String,
    /// Why it failed, and what to check; the same for all kinds if it is about the server.
    pub(super) why: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.action, self.why)
    }
}

impl Failure {
    /// `resource` is the plural, with its group.
    pub(super) fn new(verb: Verb, resource: &str, server: &str, error: &Error) -> Self {
        let action = format!("{} {resource}", verb.word());
        if let Error::Api(status) = error {
            return Self::answered(action, server, status);
        }
        if let Error::SerdeError(error) = error {
            let why = format!("{server} sent what is not Kubernetes JSON ({error}): check the address");
            return Self { code: 0, remedy: Remedy::List, is_about_credentials: false, action, why };
        }
        let text = causes(error);
        Self {
            code: 0,
            remedy: if was_reached(error) { Remedy::ResumeOrList } else { Remedy::Resume },
            is_about_credentials: is_about_certificates(&text),
            action,
            why: unanswered(server, &text),
        }
    }

    /// For an error that came as an answer, or as an event of a watch.
    pub(super) fn answered(action: String, server: &str, status: &Status) -> Self {
        let Status { code, message, reason, .. } = status;
        let why = match code {
            401 => format!(
                "{server} does not know these credentials (401): check the token or client certificate of the \
                 kubeconfig or service account, which are read again"
            ),
            403 => format!(
                "forbidden (403): the role needs the verbs list and watch on this resource, as system:node-proxier \
                 has them: {message}"
            ),
            404 => format!(
                "{server} does not have this resource (404): check the address and the server's version"
            ),
            410 => format!("too long ago for {server} (410): listing again"),
            429 => format!("{server} has too much to do (429): {message}"),
            _ => format!("{server} answered {code} {reason}: {message}"),
        };
        let remedy = match code {
            // 504 is also how a server says that it has not seen this resource version yet: its etcd was restored.
            400 | 410 | 504 => Remedy::List,
            429 => Remedy::Resume,
            _ => Remedy::ResumeOrList,
        };
        Self { code: *code, remedy, is_about_credentials: *code == 401, action, why }
    }
}

/// Whether a connection came about; what failed is then the conversation.
fn was_reached(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
            return !error.is_connect();
        }
        cause = error.source();
    }
    true
}

/// TLS alerts of the server are about the agent's certificate; all else is about the server's.
fn is_refused_certificate(why: &str) -> bool {
    why.contains("received fatal alert")
}

fn is_about_certificates(why: &str) -> bool {
    is_refused_certificate(why) || why.contains("certificate") || why.contains("UnknownIssuer")
}

fn unanswered(server: &str, why: &str) -> String {
    let why = why.trim_start_matches("ServiceError: ");
    let is = |word: &str| why.contains(word);
    let check = if is("tunnel error") || is("SOCKS error") {
        "check the proxy, and whether NO_PROXY should name this server"
    } else if is_refused_certificate(why) {
        "check client-certificate and client-key in the kubeconfig, and their dates"
    } else if is_about_certificates(why) {
        "check certificate-authority in the kubeconfig, and the name and dates of the server's certificate"
    } else if is("refused") {
        "is the API server running, and is this its address?"
    } else if is("lookup") || is("resolve") || is("dns") {
        "check the server's name and this machine's DNS"
    } else if is("unreachable")
        || is("No route to host")
        || is("timed out")
        || is("elapsed")
        || is("deadline")
    {
        "check the route and the firewall between this machine and the API server"
    } else {
        "check the API server and the network"
    };
    format!("no answer from {server}: {why}: {check}")
}
