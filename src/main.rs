//! Reads the command line and calls a noun.

use std::process::ExitCode;

fn main() -> ExitCode {
    lockstep::cli::run(lockstep::node::run)
}
