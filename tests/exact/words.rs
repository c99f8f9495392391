//! How wide programs load what a map's element holds: what must agree lies in one word, and two loads of its halves can see two
//! values. The listing is the one that the kernel has after it inlined the lookup in an array.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

/// How far behind a lookup its element is still looked at, in instructions.
const REACH: usize = 60;

/// The id of an open map.
pub(crate) fn map_id(map: &impl AsFd) -> Result<u32> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd()))?;
    let line = info.lines().find_map(|line| line.strip_prefix("map_id:"));
    line.and_then(|id| id.trim().parse().ok()).with_context(|| format!("no map: {info}"))
}

/// The loads that a program with this id makes from elements of a map: bytes of each, and from which offset.
pub(crate) fn loads(program: u32, map: u32) -> Result<Vec<(u32, i64)>> {
    let output =
        Command::new("bpftool").args(["prog", "dump", "xlated", "id", &program.to_string()]).output()?;
    ensure!(output.status.success(), "bpftool: {}", String::from_utf8_lossy(&output.stderr));
    Ok(loads_in(&String::from_utf8(output.stdout)?, map))
}

/// An instruction: where it stands, counted in slots as jumps count, and its text.
type Line<'a> = (i64, &'a str);

fn loads_in(listing: &str, map: u32) -> Vec<(u32, i64)> {
    let line = |line: &'_ str| -> Option<(i64, usize)> {
        let (slot, _) = line.trim().split_once(": (")?;
        Some((slot.parse().ok()?, line.find(") ")? + 2))
    };
    let code: Vec<Line<'_>> = (listing.lines())
        .filter_map(|text| line(text).map(|(slot, begin)| (slot, text[begin..].trim_end())))
        .collect();
    let named = format!("= map[id:{map}]");
    let is_lookup = |at: &usize| code[*at].1.starts_with("r1 ") && code[*at].1.ends_with(&named);
    (0..code.len())
        .filter(is_lookup)
        .flat_map(|at| loads_after(&code[at..code.len().min(at + REACH)]))
        .collect()
}

/// The loads through the pointer that a lookup gives, by whatever way through the code. An inlined one ends with `r0 = 0`, for an
/// index that is too large.
fn loads_after(code: &[Line<'_>]) -> Vec<(u32, i64)> {
    let Some(end) = code.iter().position(|(_, text)| *text == "r0 = 0") else { return Vec::new() };
    let mut found = BTreeSet::new();
    let mut ways = vec![(end + 1, BTreeSet::from(["r0"]))];
    let mut walked = BTreeSet::new();
    while let Some((at, mut pointers)) = ways.pop() {
        let Some(&(slot, text)) = code.get(at) else { continue };
        if pointers.is_empty() || text == "exit" || !walked.insert((at, pointers.clone())) {
            continue;
        }
        if let Some((before, distance)) = text.split_once("goto pc") {
            let target = distance.parse::<i64>().map(|distance| slot + 1 + distance).unwrap_or_default();
            if let Ok(target) = code.binary_search_by_key(&target, |(slot, _)| *slot) {
                ways.push((target, pointers.clone()));
            }
            if !before.is_empty() {
                ways.push((at + 1, pointers));
            }
            continue;
        }
        if text.starts_with("call ") {
            for register in ["r0", "r1", "r2", "r3", "r4", "r5"] {
                pointers.remove(register);
            }
        }
        if let Some((to, value)) = text.split_once(" = ") {
            if let Some((bytes, base, offset)) = load(value)
                && pointers.contains(base)
            {
                found.insert((slot, bytes, offset));
            }
            if pointers.contains(value) {
                pointers.insert(to);
            } else {
                pointers.remove(to);
            }
        }
        ways.push((at + 1, pointers));
    }
    found.into_iter().map(|(_, bytes, offset)| (bytes, offset)).collect()
}

/// A load, `*(u64 *)(r0 +8)`: its bytes, the register of the pointer, the offset.
fn load(value: &str) -> Option<(u32, &str, i64)> {
    let (bits, rest) = value.strip_prefix("*(u")?.split_once(" *)(")?;
    let (base, offset) = rest.strip_suffix(')')?.split_once(' ')?;
    Some((bits.parse::<u32>().ok()? / 8, base, offset.parse().ok()?))
}

#[test]
fn loads_of_halves_are_found() {
    let listing = "   7: (18) r1 = map[id:12]
   9: (07) r1 += 272
  10: (61) r0 = *(u32 *)(r2 +0)
  11: (35) if r0 >= 0x8000 goto pc+3
  12: (27) r0 *= 24
  13: (0f) r0 += r1
  14: (05) goto pc+1
  15: (b7) r0 = 0
  16: (15) if r0 == 0x0 goto pc+7
  17: (bf) r6 = r0
  18: (61) r1 = *(u32 *)(r0 +0)
  19: (07) r6 += 8
  20: (79) r8 = *(u64 *)(r6 +0)
  21: (b7) r6 = 1
  22: (61) r2 = *(u32 *)(r6 +4)
  23: (05) goto pc+1
  24: (61) r2 = *(u32 *)(r6 +4)
  25: (69) r3 = *(u16 *)(r8 +2)
";
    assert_eq!(loads_in(listing, 12), [(4, 0), (8, 0)]);
    assert!(loads_in(listing, 13).is_empty());
}
