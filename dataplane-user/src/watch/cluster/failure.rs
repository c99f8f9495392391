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

/// Something that failed.
#[derive(Debug)]
pub(super) struct Failure {
    /// The HTTP status; 0 if there was no answer.
    pub(super) code: u16,
    /// Whether to list again, because the watch cannot go on from where it was.
    pub(super) relist: bool,
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
            return Self { code: 0, relist: true, action, why };
        }
        Self { code: 0, relist: false, action, why: unanswered(server, &causes(error)) }
    }

    /// For an error that came as an answer, or as an event of a watch.
    pub(super) fn answered(action: String, server: &str, status: &Status) -> Self {
        let Status { code, message, reason, .. } = status;
        let why = match code {
            401 => format!(
                "{server} does not know these credentials (401): check the token or client certificate of the \
                 kubeconfig or service account"
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
        // 504 is also how a server says that it has not seen this resource version yet: its etcd was restored.
        Self { code: *code, relist: matches!(code, 400 | 410 | 504), action, why }
    }
}

fn unanswered(server: &str, why: &str) -> String {
    let why = why.trim_start_matches("ServiceError: ");
    let is = |word: &str| why.contains(word);
    let check = if is("certificate") || is("UnknownIssuer") {
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
