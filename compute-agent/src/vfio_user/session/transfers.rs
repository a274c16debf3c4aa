//! Reads and writes of regions, one or many in a message.

use farbus_vfio::user::body::{RegionAccess, WriteMulti, decode_region_write};
use farbus_vfio::user::wire::{Header, MAX_DATA_XFER};

use super::super::outbox::{Full, Outbox};
use super::super::refusal::{End, Refusal};
use super::super::regions;
use super::{Handled, Session};

impl Session {
    pub(super) fn region_read(
        &self,
        header: &Header,
        body: &[u8],
        outbox: &mut Outbox,
    ) -> Result<Result<(), Refusal>, End> {
        let checked = RegionAccess::decode(body)
            .map_err(Refusal::from)
            .and_then(|ask| {
                if ask.count as usize > MAX_DATA_XFER {
                    return Err(Refusal::TransferTooLong {
                        count: ask.count,
                        max: MAX_DATA_XFER,
                    });
                }
                let at = regions::place(self.function.as_ref(), ask.region, ask.offset, ask.count)?;
                Ok((ask, at))
            });
        let (ask, at) = match checked {
            Ok(checked) => checked,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let len = RegionAccess::LEN + ask.count as usize;
        let answer = outbox.reserve(len)?;
        let Some((head, data)) = answer.split_first_chunk_mut() else {
            return Err(Full.into());
        };
        *head = ask.encode();
        if let Err(refusal) =
            regions::read(self.function.as_ref(), self.mediator.as_ref(), at, data)
        {
            return Ok(Err(refusal));
        }
        if !header.no_reply() {
            outbox.commit(&header.reply(len))?;
        }
        Ok(Ok(()))
    }

    pub(super) fn region_write(
        &mut self,
        header: &Header,
        body: &[u8],
        outbox: &mut Outbox,
    ) -> Result<Result<(), Refusal>, End> {
        let done = decode_region_write(body)
            .map_err(Refusal::from)
            .and_then(|(ask, data)| {
                let mediator = self.mediator.as_mut();
                regions::write(self.function.as_ref(), mediator, ask, data)?;
                Ok(ask)
            });
        match done {
            Ok(ask) => self.reply(header, &ask.encode(), outbox).map(Ok),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Several writes, in order; the budget may end in the middle of them. One that is
    /// refused does not keep the others from being done, as if each had come on its own; the
    /// reply tells how many were done.
    pub(super) fn write_multi(
        &mut self,
        header: &Header,
        body: &[u8],
        outbox: &mut Outbox,
        budget: &mut u32,
    ) -> Result<Handled, End> {
        let multi = match WriteMulti::decode(body) {
            Ok(multi) => multi,
            Err(error) => {
                return self
                    .refuse(header, error.into(), outbox)
                    .map(|()| Handled::Done);
            }
        };
        for write in multi.iter().skip(self.multi.seen) {
            self.multi.seen += 1;
            match regions::write_one(self.function.as_ref(), self.mediator.as_mut(), &write) {
                Ok(()) => self.multi.done += 1,
                Err(refusal) => self.log_refusal(header, &refusal),
            }
            if *budget == 0 && self.multi.seen < multi.count() {
                return Ok(Handled::Unfinished);
            }
            *budget = budget.saturating_sub(1);
        }
        let done = std::mem::take(&mut self.multi).done;
        self.reply(header, &done.to_ne_bytes(), outbox)?;
        Ok(Handled::Done)
    }
}
