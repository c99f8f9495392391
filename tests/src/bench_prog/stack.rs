//! The deepest stack of a program, as kernels before 6.8 count it (`check_max_stack_depth`): along a chain of calls, callbacks
//! among them, each function's frame rounded up to 32 bytes. Later ones round less where there is a JIT, so the kernel that
//! runs here does not say that an older one would refuse the program.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::process::Command;

const ROUNDED_TO: u64 = 32;

/// A function of a program.
#[derive(Debug, Default)]
struct Function {
    frame: u64,
    /// The first instructions of those that it calls or passes as a callback.
    calls: Vec<i64>,
}

/// Bytes of the deepest stack of the program with this id.
pub(super) fn deepest(id: u32) -> Result<u64> {
    let output = Command::new("bpftool").args(["prog", "dump", "xlated", "id", &id.to_string()]).output()?;
    ensure!(output.status.success(), "bpftool: {}", String::from_utf8_lossy(&output.stderr));
    deepest_of(&String::from_utf8(output.stdout)?)
}

fn deepest_of(listing: &str) -> Result<u64> {
    let functions = functions(listing);
    ensure!(!functions.is_empty(), "bpftool shows no functions");
    let mut known = BTreeMap::new();
    depth(0, &functions, &mut known)
}

/// Bytes from the frame of the function at `start` on. The verifier has refused recursion.
fn depth(start: i64, functions: &BTreeMap<i64, Function>, known: &mut BTreeMap<i64, u64>) -> Result<u64> {
    if let Some(depth) = known.get(&start) {
        return Ok(*depth);
    }
    let function = functions.get(&start).with_context(|| format!("no function begins at {start}"))?;
    let mut below = 0;
    for called in &function.calls {
        below = below.max(depth(*called, functions, known)?);
    }
    let all = function.frame.max(1).next_multiple_of(ROUNDED_TO) + below;
    known.insert(start, all);
    Ok(all)
}

/// The functions in a listing of `bpftool prog dump xlated`, by their first instruction.
fn functions(listing: &str) -> BTreeMap<i64, Function> {
    let mut functions = BTreeMap::new();
    let (mut current, mut begins) = (0, false);
    // The registers that hold the frame pointer as it is.
    let mut pointers = Vec::new();
    for line in listing.lines().map(str::trim) {
        let Some((at, text)) = instruction(line) else {
            // Between instructions are lines of source, and the names of functions.
            begins |= line.ends_with("):") && !line.starts_with(';');
            continue;
        };
        if begins {
            (current, begins) = (at, false);
            pointers.clear();
        }
        let function: &mut Function = functions.entry(current).or_default();
        if let Some(offset) = after(text, "call pc").or(after(text, "subprog[")) {
            function.calls.push(at + 1 + offset);
        }
        if let Some(offset) = after(text, "(r10 ") {
            function.frame = function.frame.max(offset.unsigned_abs());
        }
        if let Some((register, offset)) = text.split_once(" += ")
            && pointers.contains(&register)
            && let Ok(offset) = offset.parse::<i64>()
        {
            function.frame = function.frame.max(offset.unsigned_abs());
        }
        if let Some((register, value)) = text.split_once(' ')
            && register.starts_with('r')
        {
            pointers.retain(|pointer| *pointer != register);
            if value == "= r10" {
                pointers.push(register);
            }
        }
    }
    functions
}

/// Number and text of an instruction: `12: (bf) r6 = r1`.
fn instruction(line: &str) -> Option<(i64, &str)> {
    let (number, rest) = line.split_once(": (")?;
    Some((number.parse().ok()?, rest.split_once(") ")?.1))
}

/// The signed number behind `mark`.
fn after(text: &str, mark: &str) -> Option<i64> {
    let rest = text.split_once(mark)?.1;
    let end = rest[1..].find(|c: char| !c.is_ascii_digit()).map_or(rest.len(), |end| end + 1);
    rest[..end].parse().ok()
}

#[test]
fn the_deepest_chain_counts() {
    let listing = "i32 first(struct __sk_buff * ctx):
; fn first(ctx: TcContext)
   0: (bf) r6 = r1
   1: (7b) *(u64 *)(r10 -8) = r1
   2: (85) call pc+3#bpf_prog_1bf8a7e3ae19b6dc_second
   3: (18) r2 = subprog[+6]
   5: (95) exit
void second(u64 key):
   6: (bf) r2 = r10
   7: (07) r2 += -40
   8: (85) call htab_map_delete_elem#220000
   9: (95) exit
i64 callback(u32 index):
  10: (bf) r2 = r10
  11: (b7) r2 = 5
  12: (07) r2 += -400
  13: (79) r1 = *(u64 *)(r10 -72)
  14: (95) exit
";
    let frames: Vec<_> = functions(listing).into_iter().map(|(at, f)| (at, f.frame, f.calls)).collect();
    assert_eq!(frames, [(0, 8, vec![6, 10]), (6, 40, vec![]), (10, 72, vec![])]);
    assert_eq!(deepest_of(listing).unwrap(), 32 + 96);
    assert!(deepest_of("").is_err());
}
