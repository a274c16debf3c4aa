//! `serve`: a software drive at a vfio-user socket, with the agent's own endpoint and no fabric:
//! what a guest would have if the drive were in its own host.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::Context;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use farbus_compute_agent::vfio_user::Endpoint;
use farbus_vfio::Function;
use farbus_vfio::soft_nvme::SoftNvme;
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm_sys_util::epoll::EventSet;

use crate::cli::ServeArgs;

enum Subscriber {
    Endpoint(Box<Endpoint>),
    /// Readable at SIGTERM or SIGINT.
    Signals {
        pipe: UnixStream,
        raised: bool,
    },
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps) {
        match self {
            Self::Endpoint(endpoint) => endpoint.init(ops),
            Self::Signals { pipe, .. } => {
                let events = Events::new_raw(pipe.as_raw_fd(), EventSet::IN);
                if let Err(error) = ops.add(events) {
                    log::error!("the event loop does not take a descriptor: {error}");
                }
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match self {
            Self::Endpoint(endpoint) => endpoint.process(events, ops),
            Self::Signals { raised, .. } => *raised = true,
        }
    }
}

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<()> {
    let drive: Arc<dyn Function> = Arc::new(SoftNvme::open(&args.soft_nvme)?);
    let socket = args.socket.display();
    let endpoint = Endpoint::bind(&args.socket, drive)
        .with_context(|| format!("the socket {socket} cannot be offered"))?;
    let mut manager = EventManager::new().context("the event loop cannot be made")?;
    let endpoint = manager.add_subscriber(Subscriber::Endpoint(Box::new(endpoint)));
    let (pipe, writer) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    let signals = manager.add_subscriber(Subscriber::Signals {
        pipe,
        raised: false,
    });
    println!("ready vfio-user={socket}");
    while !matches!(
        manager.subscriber_mut(signals)?,
        Subscriber::Signals { raised: true, .. }
    ) {
        manager.run().context("the event loop failed")?;
    }
    if let Subscriber::Endpoint(endpoint) = manager.subscriber_mut(endpoint)? {
        endpoint.shutdown();
    }
    Ok(())
}
