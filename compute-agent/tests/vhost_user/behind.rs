//! All that is said of requests, of rings and of recovery, of a driver behind an IOMMU.

mod harness {
    use std::ops::{Deref, DerefMut};

    use farbus_compute_agent::vhost_user::config::Options;

    pub(crate) use crate::harness::{
        Buffer, DATA, HEADERS, INDIRECT, MEMORY, NEXT, SIZE, TABLE, USER, WRITE, options,
    };
    use crate::harness::{Guest as Placed, Mappings};

    pub(crate) struct Guest(Placed);

    impl Guest {
        pub(crate) fn new(spec: &str) -> Self {
            Self::with(spec, options(), false)
        }

        pub(crate) fn with(spec: &str, options: Options, tracks: bool) -> Self {
            let mappings = Some(Mappings::default());
            Self(Placed::placed(spec, options, tracks, mappings))
        }
    }

    impl Deref for Guest {
        type Target = Placed;

        fn deref(&self) -> &Placed {
            &self.0
        }
    }

    impl DerefMut for Guest {
        fn deref_mut(&mut self) -> &mut Placed {
            &mut self.0
        }
    }
}

#[path = "hostile.rs"]
mod hostile;
#[path = "recovery.rs"]
mod recovery;
#[path = "requests.rs"]
mod requests;
