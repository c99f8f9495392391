//! CRC32c (RFC 3309) of data whose first bytes changed. It covers SCTP's ports, and no helper of the kernel updates it.
//!
//! The CRC is linear: changing a message by XOR changes its CRC by the CRC of the change alone, which is the change as a
//! polynomial times a power of x that the message's length says. Two tables hold the powers.

/// The polynomial of Castagnoli without its highest power, the lowest bit first as the CRC takes its bits.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The polynomial 1.
const ONE: u32 = 1 << 31;

/// How many powers each table has: together they reach any length of 16 bits.
const POWERS: usize = 256;

/// x^8n, for n bytes.
static BYTES: [u32; POWERS] = powers(8);
/// x^2048n, for n times 256 bytes.
static PAGES: [u32; POWERS] = powers(8 * POWERS as u32);

/// What a change of the first four bytes by XOR is multiplied by, one after the other ([`Product`]), to be what the CRC of `length` bytes
/// changes by. The change is taken as a number whose lowest byte comes first.
#[inline(always)]
pub fn factors(length: u16) -> [u32; 2] {
    let [pages, bytes] = length.to_be_bytes();
    [BYTES[bytes as usize], PAGES[pages as usize]]
}

/// The powers 0, `step`, twice `step` … of x.
const fn powers(step: u32) -> [u32; POWERS] {
    let mut factor = ONE;
    let mut times = 0;
    while times < step {
        factor = by_x(factor);
        times += 1;
    }
    let mut table = [ONE; POWERS];
    let mut at = 1;
    while at < POWERS {
        table[at] = multiply(table[at - 1], factor);
        at += 1;
    }
    table
}

/// A polynomial times x, modulo the CRC's.
#[inline(always)]
const fn by_x(a: u32) -> u32 {
    (a >> 1) ^ (POLYNOMIAL & (a & 1).wrapping_neg())
}

/// The product of two polynomials, modulo the CRC's, being taken.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    a: u32,
    b: u32,
    product: u32,
}

impl Product {
    /// Steps that it takes.
    pub const STEPS: u32 = u32::BITS;

    /// Of two polynomials, before the first step.
    #[inline(always)]
    pub const fn of(a: u32, b: u32) -> Self {
        Self { a, b, product: 0 }
    }

    /// One step. Without a branch: a verifier walks it once.
    #[inline(always)]
    pub const fn step(&mut self) {
        self.product ^= self.a & (self.b >> (u32::BITS - 1)).wrapping_neg();
        self.a = by_x(self.a);
        self.b <<= 1;
    }

    /// The product, after the last step.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        self.product
    }
}

/// The product of two polynomials.
const fn multiply(a: u32, b: u32) -> u32 {
    let mut product = Product::of(a, b);
    let mut step = 0;
    while step < Product::STEPS {
        product.step();
        step += 1;
    }
    product.get()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// Bit by bit, from the definition.
    fn crc(data: &[u8]) -> u32 {
        let mut state = u32::MAX;
        for byte in data {
            state ^= u32::from(*byte);
            for _ in 0..8 {
                state = if state & 1 == 1 { (state >> 1) ^ POLYNOMIAL } else { state >> 1 };
            }
        }
        !state
    }

    /// What the CRC of `length` bytes changes by where their first four change by XOR with `change`.
    fn delta(change: [u8; 4], length: u16) -> u32 {
        factors(length).into_iter().fold(u32::from_le_bytes(change), multiply)
    }

    #[test]
    fn the_reference_is_right_itself() {
        // RFC 3720 appendix B.4.
        assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc(b"123456789"), 0xe306_9283);
    }

    /// S6
    #[test]
    fn a_change_of_the_first_four_bytes_changes_the_crc_by_its_delta() {
        let data: Vec<u8> = (0..65_535u32).map(|n| (n * 7 + n / 251) as u8).collect();
        for length in [4, 5, 12, 16, 255, 256, 257, 1_472, 4_096, 32_767, 65_535] {
            let mut changed = data[..length].to_vec();
            changed[..4].copy_from_slice(&[0x9c, 0x40, 0x1f, 0x90]);
            let change = [0, 1, 2, 3].map(|at: usize| data[at] ^ changed[at]);
            let delta = delta(change, length as u16);
            assert_eq!(crc(&data[..length]) ^ delta, crc(&changed), "{length} bytes");
        }
        assert_eq!(delta([0; 4], 1_000), 0);
    }
}
