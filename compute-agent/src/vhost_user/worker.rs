//! One attachment's event loop, with a vhost-user endpoint: the VMM's socket, the queues' kicks and
//! the link, all on one thread. Two others exist for a while only: one while a lost link is
//! replaced, one while the drive is brought up.

#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use farbus_shadow_mem::polling::{Polling, Waiter};
use farbus_shadow_mem::remote::RemoteFunction;
use farbus_vfio::Function;
use log::{info, warn};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::channel::{BackChange, Channel, Ended, Served};
use super::config::Options;
use super::device::{Change, Device, Worked};
use super::drive::{BringUp, Drive};
use super::reactor::Reactor;
use super::socket::Socket;
use crate::custody::Custody;
use crate::peer::pid_of;
use crate::reconnect::Source;
use crate::upkeep::{TICK, Upkeep, signals};

/// Messages of a VMM before other work has its turn.
const BURST: usize = 16;
/// Looks at the link and the queues between two at everything else.
const LOOKS_PER_WAIT: u32 = 4;
/// How often the link is looked after while another thread brings the drive up: what that writes
/// to doorbells waits for it.
const WHILE_BROUGHT_UP: Duration = Duration::from_millis(1);
/// Pause before a drive that could not be brought up is tried again.
const PAUSE: Duration = Duration::from_secs(2);

/// What an event is about: its data. Kicks have theirs from [`KICK`] on.
const LINK: u32 = 0;
const SIGNALS: u32 = 1;
const CLAIMED: u32 = 2;
const LISTENER: u32 = 3;
const CLIENT: u32 = 4;
const LOST: u32 = 5;
const BROUGHT_UP: u32 = 6;
const BACK: u32 = 7;
const KICK: u32 = 16;

/// See the module's own description.
pub struct Worker {
    reactor: Reactor,
    remote: Arc<RemoteFunction>,
    upkeep: Upkeep,
    signals: OwnedFd,
    options: Options,
    /// Signalled when a VMM has truncated memory under this process.
    lost: Arc<EventFd>,
    brought_up: Arc<EventFd>,
    bring_up: Option<BringUp>,
    device: Option<Arc<Mutex<Device>>>,
    socket: Option<Socket>,
    channel: Option<Channel>,
    /// The client may have sent more than was looked at.
    unread: bool,
    /// Its next message waits until a queue has stopped.
    waits: bool,
    due: Instant,
    waiter: Waiter,
    /// Rounds since the event loop was last asked.
    looks: u32,
    /// Nothing is to be waited for yet.
    looking: bool,
    ended: bool,
}

impl Worker {
    /// For a remote function. The drive is brought up by [`Self::start`].
    pub fn new(
        remote: Arc<RemoteFunction>,
        source: Source,
        options: Options,
        polling: Polling,
        custody: Custody,
    ) -> anyhow::Result<Self> {
        remote.look_for_doorbells();
        let mut reactor = Reactor::new()?;
        let upkeep = Upkeep::new(remote.clone(), source, custody, LINK)?;
        let signals = signals()?;
        let lost = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let brought_up = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        reactor.add(signals.as_raw_fd(), SIGNALS, EventSet::IN)?;
        reactor.add(upkeep.done().as_raw_fd(), CLAIMED, EventSet::IN)?;
        reactor.add(lost.as_raw_fd(), LOST, EventSet::IN)?;
        reactor.add(brought_up.as_raw_fd(), BROUGHT_UP, EventSet::IN)?;
        Ok(Self {
            reactor,
            remote,
            upkeep,
            signals,
            options,
            lost,
            brought_up,
            bring_up: None,
            device: None,
            socket: None,
            channel: None,
            unread: false,
            waits: false,
            due: Instant::now() + TICK,
            waiter: Waiter::new(polling),
            looks: 0,
            looking: false,
            ended: false,
        })
    }

    /// Brings the drive up for the first time; its failure is the caller's to tell.
    pub fn start(&mut self) -> anyhow::Result<()> {
        self.begin_bring_up(Duration::ZERO)?;
        while self.device.is_none() && !self.ended {
            self.turn()?;
            if let Some(Err(error)) = self.take_brought_up() {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Serves clients of `socket` until SIGTERM or SIGINT, or until the only client it can have
    /// has gone; then gives the export back.
    pub fn run(mut self, socket: Socket) -> anyhow::Result<()> {
        if let Some(descriptor) = socket.descriptor() {
            self.reactor.add(descriptor, LISTENER, EventSet::IN)?;
        }
        self.socket = Some(socket);
        self.accept()?;
        while !self.ended {
            self.turn()?;
            if let Some(Err(error)) = self.take_brought_up() {
                warn!("the drive cannot be used: {error:#}; it is tried again");
                self.begin_bring_up(PAUSE)?;
            }
        }
        self.end()
    }

    fn function(&self) -> Arc<dyn Function> {
        self.remote.clone()
    }

    fn begin_bring_up(&mut self, pause: Duration) -> anyhow::Result<()> {
        let (function, done) = (self.function(), self.brought_up.clone());
        let queues = self.options.num_queues;
        self.bring_up = Some(BringUp::start(function, queues, pause, done)?);
        Ok(())
    }

    /// The drive, or why there is none, once either is known.
    fn take_brought_up(&mut self) -> Option<anyhow::Result<()>> {
        let outcome = self.bring_up.as_ref()?.take()?;
        self.bring_up = None;
        let drive = match outcome {
            Ok(drive) => drive,
            Err(error) => return Some(Err(anyhow::Error::new(error))),
        };
        let Some(device) = &self.device else {
            self.device = Some(self.present(drive));
            return Some(Ok(()));
        };
        let changed = lock(device).drive_is_back(drive);
        info!("the drive is back; what was under way begins anew");
        if let (true, Some(channel)) = (changed, &mut self.channel) {
            channel.config_changed();
        }
        Some(Ok(()))
    }

    fn present(&self, drive: Drive) -> Arc<Mutex<Device>> {
        let shape = drive.shape();
        info!(
            "namespace {} of drive {}: {} blocks of {} bytes",
            shape.nsid, shape.serial, shape.blocks, shape.block_size
        );
        let options = self.options.clone();
        let device = Device::new(self.function(), drive, options, self.lost.clone());
        Arc::new(Mutex::new(device))
    }

    /// Does what there is to do, and waits if there is nothing.
    fn turn(&mut self) -> anyhow::Result<()> {
        let received = self.upkeep.receive(self.looking || self.bring_up.is_some());
        let worked = self.work()?;
        // What was put into the drive's queues goes out at once, in one message.
        let sent = self.remote.pump();
        let busy = received || worked.any || sent || self.unread;
        if busy {
            self.waiter.found();
        }
        self.looking = busy
            || worked.more
            || self.waiter.looks_again()
            || self.arm()
            || !self.remote.may_sleep();
        self.looks = self.looks.wrapping_add(1);
        if self.looking && self.looks % LOOKS_PER_WAIT != 0 && !self.unread {
            return Ok(());
        }
        // Before a sleep, which would otherwise not end when the network takes more again.
        self.upkeep.look_after(&mut self.reactor.ops()?)?;
        self.wait()?;
        self.handle_events()?;
        if Instant::now() >= self.due {
            self.due = Instant::now() + TICK;
            self.tick()?;
        }
        self.serve()
    }

    /// Has the guest kick; whether it has something already.
    fn arm(&self) -> bool {
        self.device
            .as_ref()
            .is_some_and(|device| lock(device).arm())
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        if self.looking {
            return self.reactor.wait(Duration::ZERO);
        }
        let asleep = Instant::now();
        let left = self.due.saturating_duration_since(asleep);
        let most = match self.bring_up {
            Some(_) => WHILE_BROUGHT_UP,
            None => TICK,
        };
        self.reactor.wait(left.min(most))?;
        self.waiter.slept(asleep.elapsed());
        Ok(())
    }

    fn handle_events(&mut self) -> anyhow::Result<()> {
        let events = std::mem::take(&mut self.reactor.events);
        for event in &events {
            match event.data() {
                LINK => self.upkeep.ready(),
                SIGNALS => self.ended = true,
                CLAIMED => {
                    let linked = self.upkeep.claimed(&mut self.reactor.ops()?)?;
                    if let (true, Some(device)) = (linked, &self.device) {
                        lock(device).look_again().context("the drive's size")?;
                    }
                }
                LISTENER => self.accept()?,
                CLIENT | BACK => self.unread = true,
                LOST => {
                    let _ = self.lost.read();
                }
                BROUGHT_UP => {
                    let _ = self.brought_up.read();
                }
                kick => {
                    if let Some(device) = &self.device {
                        lock(device).kicked((kick - KICK) as u16);
                    }
                }
            }
        }
        self.reactor.events = events;
        Ok(())
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        self.remote.tick();
        let failed = match &self.device {
            Some(device) => lock(device).failed_drive(),
            None => None,
        };
        if let Some(drive) = failed {
            warn!("the drive has failed; it is reset, and the guest's requests wait");
            drive.shut();
            self.begin_bring_up(Duration::ZERO)?;
        }
        Ok(())
    }

    fn work(&mut self) -> anyhow::Result<Worked> {
        let Some(device) = &self.device else {
            return Ok(Worked::default());
        };
        let worked = lock(device).work(self.looking).context("the drive")?;
        if let Some(channel) = &mut self.channel {
            if worked.changed {
                channel.config_changed();
            }
            if worked.asks {
                channel.ask();
            }
        }
        Ok(worked)
    }

    /// Takes the next client, unless there is one.
    fn accept(&mut self) -> anyhow::Result<()> {
        let (Some(socket), Some(device), None) = (&mut self.socket, &self.device, &self.channel)
        else {
            return Ok(());
        };
        let stream = match socket.accept() {
            Ok(Some(stream)) => stream,
            Ok(None) => return Ok(()),
            Err(error) => {
                warn!("a VMM could not be let in: {error}");
                return Ok(());
            }
        };
        let device = device.clone();
        if let Err(error) = self.admit(stream, &device) {
            warn!("a VMM could not be let in: {error:#}");
        }
        Ok(())
    }

    fn admit(&mut self, stream: UnixStream, device: &Arc<Mutex<Device>>) -> anyhow::Result<()> {
        let peer = pid_of(&stream);
        let channel = Channel::new(stream, device.clone())?;
        // A message that never ends is told of once.
        let set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.reactor.add(channel.as_raw_fd(), CLIENT, set)?;
        lock(device).open(peer);
        info!(
            "a VMM has connected{}",
            peer.map_or(String::new(), |pid| format!(" (pid {pid})"))
        );
        self.channel = Some(channel);
        self.unread = true;
        // One at a time: whoever comes meanwhile waits in the listener's backlog.
        if let Some(listener) = self.socket.as_ref().and_then(Socket::descriptor) {
            self.reactor.remove(listener)?;
        }
        Ok(())
    }

    /// Handles messages of the client.
    fn serve(&mut self) -> anyhow::Result<()> {
        let (Some(device), Some(channel)) = (&self.device, &mut self.channel) else {
            self.unread = false;
            return Ok(());
        };
        if lock(device).memory_lost() {
            return self.let_go(&Ended::Protocol("it has truncated the guest's memory"));
        }
        if !self.unread && !self.waits {
            return Ok(());
        }
        (self.unread, self.waits) = (false, false);
        // A pipe that the VMM has closed would be an event for ever.
        let kicks = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let answers = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        for _ in 0..BURST {
            let served = channel.serve();
            let changes = lock(device).changes();
            for change in changes {
                let done = match change {
                    Change::New(index) => match lock(device).kick(index) {
                        Some(kick) => {
                            let (fd, data) = (kick.as_raw_fd(), KICK + u32::from(index));
                            self.reactor.add(fd, data, kicks)
                        }
                        None => Ok(()),
                    },
                    Change::Gone(kick) => self.reactor.remove(kick.as_raw_fd()),
                };
                done?;
            }
            for change in channel.back_changes() {
                match change {
                    BackChange::New(fd) => self.reactor.add(fd, BACK, answers)?,
                    BackChange::Gone(back) => self.reactor.remove(back.as_raw_fd())?,
                }
            }
            match served {
                Ok(Served::One) => {}
                Ok(Served::None) => return Ok(()),
                // Looked at again in the next turn, which a completion brings about.
                Ok(Served::Waits) => {
                    self.waits = true;
                    return Ok(());
                }
                Err(ended) => return self.let_go(&ended),
            }
        }
        self.unread = true;
        Ok(())
    }

    fn let_go(&mut self, why: &Ended) -> anyhow::Result<()> {
        match why {
            Ended::Closed => info!("{why}"),
            _ => warn!("{why}; the connection is closed"),
        }
        if let Some(channel) = self.channel.take() {
            self.reactor.remove(channel.as_raw_fd())?;
            if let Some(back) = channel.into_back() {
                self.reactor.remove(back.as_raw_fd())?;
            }
        }
        (self.unread, self.waits) = (false, false);
        if let Some(device) = &self.device {
            lock(device).close();
            let changes = lock(device).changes();
            for change in changes {
                if let Change::Gone(kick) = change {
                    self.reactor.remove(kick.as_raw_fd())?;
                }
            }
        }
        match self.socket.as_ref().map(Socket::descriptor) {
            Some(Some(listener)) => {
                self.reactor.add(listener, LISTENER, EventSet::IN)?;
                self.accept()
            }
            _ => {
                self.ended = true;
                Ok(())
            }
        }
    }

    fn end(mut self) -> anyhow::Result<()> {
        if let (Some(_), Some(device)) = (self.channel.take(), &self.device) {
            lock(device).close();
        }
        drop(self.socket.take());
        self.remote.release();
        if let Some(drive) = self.device.take().and_then(|d| lock(&d).take_drive()) {
            drive.shut();
        }
        drop(self.signals);
        Ok(())
    }
}

fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    // There is one thread, so a panic under the lock has ended all of it.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
