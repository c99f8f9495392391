//! Who is answered in a layout, held against who must be.

use super::{Layout, Raised, Target, Who};
use crate::lab::Family;
use crate::lab::client::{Asked, Client};
use anyhow::Result;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long an interface that has just come may take to be served.
const SERVED_WITHIN: Duration = Duration::from_secs(5);
/// How long silence must last to count as a drop.
const SILENCE: Duration = Duration::from_millis(400);

/// Bytes of a datagram that is longer than an overlay takes (1,450 bytes) and not longer than Ethernet does, with their headers.
const LONG: usize = 1460;

#[derive(Clone, Copy, Debug)]
enum Transport {
    Tcp,
    Udp,
    /// A long datagram that may be cut up.
    LongUdp,
}

impl Transport {
    const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];

    fn ask(self, client: &Client, to: SocketAddr) -> Asked {
        match self {
            Self::Tcp => client.tcp(to),
            Self::Udp => client.udp(to),
            Self::LongUdp => client.udp_to_cut_up(to, LONG),
        }
    }
}

/// What is to be asked.
struct Question {
    who: Who,
    target: Target,
    transport: Transport,
    to: SocketAddr,
}

/// Each who of a list with each of what it calls.
fn pairs(list: &'static [(Who, &'static [Target])]) -> impl Iterator<Item = (Who, Target)> + use<> {
    list.iter().flat_map(|(who, targets)| targets.iter().map(|target| (*who, *target)))
}

impl Layout {
    /// How many questions are asked.
    pub fn questions(&self) -> usize {
        let each = Family::BOTH.len() * Transport::BOTH.len();
        pairs(self.answered).chain(pairs(self.unanswered)).count() * each + pairs(self.cut_up).count()
    }
}

impl Raised {
    /// Has everybody ask whom the layout names, over both families and TCP and UDP. A line for each that went wrong.
    /// An answer may take `patience`.
    pub fn wrong(&self, patience: Duration) -> Result<Vec<String>> {
        let (mut wrong, begun) = (Vec::new(), Instant::now());
        let late = !self.layout().later.is_empty();
        for question in self.long_questions().chain(self.questions(self.layout().answered)) {
            let client = self.client(question.who)?.timeout(patience);
            let mut answer = question.transport.ask(&client, question.to);
            while answer.is_err() && late && begun.elapsed() < SERVED_WITHIN {
                answer = question.transport.ask(&client, question.to);
            }
            if answer.as_ref().map(|answer| answer.pod.as_str()) != Ok(question.target.answers()) {
                wrong.push(question.line(&answer));
            }
        }
        for question in self.questions(self.layout().unanswered) {
            let client = self.client(question.who)?.timeout(SILENCE);
            let answer = question.transport.ask(&client, question.to);
            if answer.is_ok() {
                wrong.push(question.line(&answer));
            }
        }
        Ok(wrong)
    }

    fn long_questions(&self) -> impl Iterator<Item = Question> {
        pairs(self.layout().cut_up).map(|(who, target)| {
            let to = self.address(target, Family::V4);
            Question { who, target, transport: Transport::LongUdp, to }
        })
    }

    fn questions(&self, list: &'static [(Who, &'static [Target])]) -> impl Iterator<Item = Question> {
        let each = move |(family, (who, target)): (Family, (Who, Target))| {
            let to = self.address(target, family);
            Transport::BOTH.map(|transport| Question { who, target, transport, to })
        };
        Family::BOTH
            .into_iter()
            .flat_map(move |family| pairs(list).map(move |pair| (family, pair)))
            .flat_map(each)
    }
}

impl Question {
    fn line(&self, answer: &Asked) -> String {
        let Self { who, target, transport, to } = self;
        let answer = match answer {
            Ok(answer) => answer.text.clone(),
            Err(failure) => failure.to_string(),
        };
        format!("{who:?} {transport:?} {target:?} {to}: {answer}")
    }
}
