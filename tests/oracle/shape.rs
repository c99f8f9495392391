//! The shapes in which a packet may come: plain, with options or extension headers, behind VLAN tags (P21), in fragments (P20).

use crate::random::Random;
use dataplane_tests::oracle::wire::{ETHERNET, behind, cut_up, tagged};

/// How a packet is sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Shape {
    /// As it is.
    Plain,
    /// With IPv4 options, or IPv6 extension headers.
    Behind { options: Vec<u8>, extensions: Vec<(u8, Vec<u8>)> },
    /// With VLAN tags in front.
    Tagged(usize),
    /// Cut up, the pieces in this order; those that are not named are lost.
    Fragments { id: u16, piece: usize, order: Vec<usize> },
}

/// Most fragments of a packet that are sent.
const FRAGMENTS: usize = 4;

/// A shape; with tags only where a frame has them.
pub(crate) fn random(random: &mut Random, tags: bool) -> Shape {
    match random.below(30) {
        0 | 1 => {
            let options = vec![1; 4 * (1 + random.below(10))];
            Shape::Behind { options, extensions: extensions(random) }
        }
        2..=4 => {
            let mut order: Vec<usize> = (0..FRAGMENTS).collect();
            if random.chance(30) {
                let (a, b) = (random.below(FRAGMENTS), random.below(FRAGMENTS));
                order.swap(a, b);
            }
            if random.chance(15) {
                order.remove(random.below(FRAGMENTS));
            }
            // Few identifications, so that datagrams meet.
            Shape::Fragments { id: random.below(5) as u16, piece: random.of(&[8, 16, 24, 32, 504]), order }
        }
        5..=9 if tags => Shape::Tagged(1 + random.below(3)),
        _ => Shape::Plain,
    }
}

/// Up to five headers, and now and then more bytes than are followed, or a source route.
fn extensions(random: &mut Random) -> Vec<(u8, Vec<u8>)> {
    let header = |random: &mut Random| {
        let number = random.of(&[0, 43, 60, 60]);
        let words = if random.chance(10) { random.below(17) } else { random.below(3) };
        let mut rest = vec![0; 7 + 8 * words];
        rest[0] = words as u8;
        if number == 43 {
            rest[2] = u8::from(random.chance(20));
        } else {
            // One option that fills it all up.
            (rest[1], rest[2]) = (1, (4 + 8 * words) as u8);
        }
        (number, rest)
    };
    (0..1 + random.below(5)).map(|_| header(random)).collect()
}

impl Shape {
    /// The frames that a plain one is sent as.
    pub(crate) fn frames(&self, plain: &[u8]) -> Vec<Vec<u8>> {
        match self {
            Self::Plain => vec![plain.to_vec()],
            Self::Behind { options, extensions } => vec![behind(plain, options, extensions)],
            Self::Tagged(tags) => vec![tagged(plain, *tags)],
            Self::Fragments { id, piece, order } => {
                let pieces = cut_up(plain, *id, *piece);
                let atomic = pieces.len() == 1 && plain[ETHERNET] >> 4 == 4;
                if atomic {
                    return vec![plain.to_vec()];
                }
                order.iter().filter_map(|at| pieces.get(*at).cloned()).collect()
            }
        }
    }
}
