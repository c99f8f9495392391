//! The clock that flows are stamped with, as the programs have it and as the command line works it out.

use dataplane_common::flow::TICK_MASK;
use dataplane_user::admin::clock;
use dataplane_user::kernel::clock::Clock;
use dataplane_user::kernel::object::{Object, Options};

#[test]
fn the_clock_that_needs_no_program_is_that_of_the_programs() {
    let programs = Clock::new(&mut Object::open(&Options::default()).unwrap()).unwrap();
    let worked_out = clock::read().unwrap().now;
    // One may have moved on since, and jiffies begin a moment after the clock that they are counted from.
    let ahead = worked_out.wrapping_sub(programs.tick()).wrapping_add(2) & TICK_MASK;
    assert!(ahead <= 4, "{worked_out} and {}", programs.tick());
}
