//! RDMA during set-up, in builds with and without it.

#[cfg(feature = "verbs")]
pub(super) use crate::verbs::Prepared;

#[cfg(not(feature = "verbs"))]
pub(super) use without::Prepared;

#[cfg(not(feature = "verbs"))]
mod without {
    use std::convert::Infallible;
    use std::net::IpAddr;
    use std::time::Duration;

    use crate::provider::Options;
    use crate::wire::{Epoch, RdmaEndpoint, Side};
    use crate::{FabricError, Link};

    /// There is none.
    pub(in crate::session) struct Prepared(Infallible);

    impl Prepared {
        pub(in crate::session) fn new(_: IpAddr, _: &Options) -> Result<Self, String> {
            Err("this program was built without RDMA".to_owned())
        }

        pub(in crate::session) fn endpoint(&self) -> RdmaEndpoint {
            match self.0 {}
        }

        pub(in crate::session) fn describe(&self) -> String {
            match self.0 {}
        }

        pub(in crate::session) fn connect(&mut self, _: RdmaEndpoint) -> Result<(), String> {
            match self.0 {}
        }

        pub(in crate::session) fn prove(&mut self) -> Result<(), String> {
            match self.0 {}
        }

        pub(in crate::session) fn into_link(
            self,
            _: Box<dyn Link>,
            _: Side,
            _: Epoch,
            _: Option<Duration>,
        ) -> Result<Box<dyn Link>, FabricError> {
            match self.0 {}
        }
    }
}
