//! Exercises the RDMA provider of the machine that it runs in, and says what it saw. The test bed
//! runs it in machines with soft RoCE.
//!
//! - `pair`: both sides of a claim, in one process or two. `frames`, `keys`, `loss`: what is checked of
//!   them. `bare`: the device itself, without our protocol. `stale`: daemons that were fenced off.

#![forbid(unsafe_code)]

mod bare;
mod frames;
mod keys;
mod loss;
mod pair;
mod stale;

use std::error::Error;
use std::process::ExitCode;

const USAGE: &str = "\
usage: farbus-verbs-check frames ADDRESS      payloads land, messages come in order; counts
       farbus-verbs-check keys ADDRESS        dead and foreign keys are refused
       farbus-verbs-check killed ADDRESS      a peer is killed; how soon that is known
       farbus-verbs-check cut ADDRESS COMMAND runs a shell command that cuts the network; the same
       farbus-verbs-check bare ADDRESS COUNT  round trips of bare writes with immediate data, polled
       farbus-verbs-check stream ADDRESS MS   throughput of bare writes of several sizes, each for a time
       farbus-verbs-check stale-reads SOCKET PID COMMAND
                                              freezes device server PID in the middle of reads, has a
                                              command replace it, and wakes it up again
       farbus-verbs-check stale-writes SOCKET PID COMMAND OTHER
                                              freezes agent PID in the middle of writes, has a command
                                              start another at socket OTHER, and wakes it up again
       farbus-verbs-check serve ADDRESS       the other side of killed and cut

ADDRESS is an IP address of this machine that an RDMA device has.

exit status: 0 done, 1 failed, 2 usage";

/// What a check comes to.
type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["frames", address] => frames::check(address),
        ["keys", address] => keys::check(address),
        ["killed", address] => loss::killed(address),
        ["cut", address, command] => loss::cut(address, command),
        ["bare", address, count] => bare::measure(address, count),
        ["stream", address, milliseconds] => bare::stream(address, milliseconds),
        ["stale-reads", socket, pid, command] => stale::reads(socket, pid, command),
        ["stale-writes", socket, pid, command, other] => stale::writes(socket, pid, command, other),
        ["serve", address] => loss::serve(address),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    println!("failed: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        println!("  because: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}

/// A failure unless something holds.
fn ensure(holds: bool, what: impl Into<String>) -> Outcome {
    if holds {
        Ok(())
    } else {
        Err(what.into().into())
    }
}
