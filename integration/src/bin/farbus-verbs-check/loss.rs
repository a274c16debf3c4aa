//! How soon a peer that is gone is known to be.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use farbus_fabric::FabricError;
use farbus_fabric::wire::Message;

use crate::pair::{End, GUEST, Heard, accept, claim, memory};
use crate::{Outcome, ensure};

/// What is promised.
const LIMIT: Duration = Duration::from_secs(1);
/// How often something is said while one side waits for the end of the other.
const BEAT: Duration = Duration::from_millis(50);

/// The device side of one claim, until it ends.
pub(crate) fn serve(address: &str) -> Outcome {
    let listener = TcpListener::bind((address, 0))?;
    println!("{}", listener.local_addr()?);
    std::io::stdout().flush()?;
    let (stream, _) = listener.accept()?;
    let mut end = accept(stream, 1)?;
    loop {
        end.link.receive(&mut Heard::default())?;
        thread::sleep(Duration::from_millis(1));
    }
}

fn start(address: &str) -> Outcome<(Child, End)> {
    let program = std::env::current_exe()?;
    // The loader that started this program, if it was not the kernel's choice, is what is seen
    // as this program; a script of this name starts both.
    let mut command = match program.file_name().and_then(|name| name.to_str()) {
        Some(name) if name.starts_with("ld") => Command::new("farbus-verbs-check"),
        _ => Command::new(program),
    };
    let mut child = command
        .args(["serve", address])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut place = String::new();
    let said = child.stdout.take().ok_or("no output")?;
    BufReader::new(said).read_line(&mut place)?;
    let end = claim(place.trim(), &memory("check-guest", GUEST)?)?;
    Ok((child, end))
}

/// The peer's process is killed, with nothing under way.
pub(crate) fn killed(address: &str) -> Outcome {
    let (mut child, mut end) = start(address)?;
    let begun = Instant::now();
    child.kill()?;
    let error = end.hear_the_end()?;
    let after = begun.elapsed();
    child.wait()?;
    println!("killed peer: known after {} ms: {error}", after.as_millis());
    ensure(after < LIMIT, "too late")?;
    ensure(error.should_reconnect(), "no reason to connect again")
}

/// The network is cut, while messages are exchanged.
pub(crate) fn cut(address: &str, command: &str) -> Outcome {
    let (mut child, mut end) = start(address)?;
    end.send(&Message::Ping { nonce: 0 })?;
    let begun = Instant::now();
    let cut = Command::new("sh").args(["-c", command]).status()?;
    ensure(cut.success(), "the network could not be cut")?;
    let error = until_lost(&mut end);
    let after = begun.elapsed();
    child.kill()?;
    child.wait()?;
    println!("cut network: known after {} ms: {error}", after.as_millis());
    ensure(after < LIMIT + BEAT, "too late")?;
    ensure(error.should_reconnect(), "no reason to connect again")
}

/// Says something now and then, until that fails.
fn until_lost(end: &mut End) -> FabricError {
    let mut said = Instant::now();
    loop {
        if said.elapsed() > BEAT {
            said = Instant::now();
            if let Err(error) = end.send(&Message::Ping { nonce: 0 }) {
                return error;
            }
        }
        if let Err(error) = end.link.receive(&mut Heard::default()) {
            return error;
        }
        thread::sleep(Duration::from_millis(1));
    }
}
