//! Queue pairs of reliable connections, and chains of work requests.

use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use ibverbs_sys as sys;
use sys::ibv_qp_attr_mask as mask;

use super::{CompletionQueue, Domain, Gid, Piece, Region, check};

/// How much of what a queue pair takes.
#[derive(Clone, Copy, Debug)]
pub struct QueueSizes {
    /// Work requests that may be under way.
    pub sends: u32,
    /// Receives that may be posted.
    pub receives: u32,
    /// Pieces that one work request may gather.
    pub pieces: u32,
    /// Bytes that a work request may carry in itself.
    pub inline: u32,
}

/// One end of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The port's address.
    pub gid: Gid,
    /// The port's local identifier; 0 on Ethernet.
    pub lid: u16,
    /// The queue pair.
    pub queue_pair: u32,
    /// Where its numbering of packets begins.
    pub first_packet: u32,
}

/// How two queue pairs are joined.
#[derive(Clone, Copy, Debug)]
pub struct Connection {
    /// This side's port.
    pub port: u8,
    /// The place of this side's address in the port's table.
    pub gid_index: u8,
    /// Largest packet in bytes.
    pub mtu: u16,
    /// A packet is sent again after 4.096 µs times two to this power without an answer. Devices
    /// may take up to four times as long.
    pub timeout: u8,
    /// How often a packet is sent again: at most 6, since 7 means for ever to some devices.
    pub retries: u8,
}

/// A queue pair of a reliable connection.
#[derive(Debug)]
pub struct QueuePair {
    pair: NonNull<sys::ibv_qp>,
    inline: u32,
    domain: Arc<Domain>,
    _sends: Arc<CompletionQueue>,
    _receives: Arc<CompletionQueue>,
}

// SAFETY: rule 4 of the module; the pointer is owned.
unsafe impl Send for QueuePair {}
// SAFETY: rule 4 of the module.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// A queue pair that is not connected.
    pub fn new(
        domain: &Arc<Domain>,
        sends: &Arc<CompletionQueue>,
        receives: &Arc<CompletionQueue>,
        sizes: QueueSizes,
    ) -> io::Result<Self> {
        let mut attributes = sys::ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: sends.as_ptr(),
            recv_cq: receives.as_ptr(),
            srq: null_mut(),
            cap: sys::ibv_qp_cap {
                max_send_wr: sizes.sends,
                max_recv_wr: sizes.receives,
                max_send_sge: sizes.pieces,
                max_recv_sge: 1,
                max_inline_data: sizes.inline,
            },
            qp_type: sys::ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queues are alive, and held by the queue pair.
        let pair = unsafe { sys::ibv_create_qp(domain.as_ptr(), &raw mut attributes) };
        let pair = NonNull::new(pair).ok_or_else(io::Error::last_os_error)?;
        Ok(QueuePair {
            pair,
            inline: attributes.cap.max_inline_data.min(sizes.inline),
            domain: Arc::clone(domain),
            _sends: Arc::clone(sends),
            _receives: Arc::clone(receives),
        })
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        // SAFETY: the queue pair is alive; the field does not change.
        unsafe { (*self.pair.as_ptr()).qp_num }
    }

    /// Bytes that a work request may carry in itself.
    pub fn max_inline(&self) -> u32 {
        self.inline
    }

    fn modify(&self, attributes: &mut sys::ibv_qp_attr, which: mask) -> io::Result<()> {
        // SAFETY: the queue pair is alive, and the attributes that the mask names are set.
        check(unsafe { sys::ibv_modify_qp(self.pair.as_ptr(), attributes, which.0 as libc::c_int) })
    }

    /// Makes it take receives; the peer may write where a key says so.
    pub fn initialise(&self, port: u8) -> io::Result<()> {
        let access = sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
            | sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
        let mut attributes = sys::ibv_qp_attr {
            qp_state: sys::ibv_qp_state::IBV_QPS_INIT,
            qp_access_flags: access.0,
            port_num: port,
            ..Default::default()
        };
        let which = mask::IBV_QP_STATE
            | mask::IBV_QP_PKEY_INDEX
            | mask::IBV_QP_PORT
            | mask::IBV_QP_ACCESS_FLAGS;
        self.modify(&mut attributes, which)
    }

    /// Joins it to the peer's: from here on it sends and receives.
    pub fn connect(
        &self,
        connection: &Connection,
        first_packet: u32,
        peer: &Address,
    ) -> io::Result<()> {
        let on_ethernet = peer.lid == 0;
        let mut attributes = sys::ibv_qp_attr {
            qp_state: sys::ibv_qp_state::IBV_QPS_RTR,
            path_mtu: mtu_code(connection.mtu),
            dest_qp_num: peer.queue_pair,
            rq_psn: peer.first_packet,
            max_dest_rd_atomic: 1,
            // 0.64 ms (IBTA 1.4 §9.7.5.2.8, table 45).
            min_rnr_timer: 12,
            ..Default::default()
        };
        attributes.ah_attr.port_num = connection.port;
        attributes.ah_attr.dlid = peer.lid;
        attributes.ah_attr.is_global = on_ethernet.into();
        attributes.ah_attr.grh.dgid = sys::ibv_gid { raw: peer.gid.0 };
        attributes.ah_attr.grh.sgid_index = connection.gid_index;
        attributes.ah_attr.grh.hop_limit = 64;
        let which = mask::IBV_QP_STATE
            | mask::IBV_QP_AV
            | mask::IBV_QP_PATH_MTU
            | mask::IBV_QP_DEST_QPN
            | mask::IBV_QP_RQ_PSN
            | mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(&mut attributes, which)?;
        let mut attributes = sys::ibv_qp_attr {
            qp_state: sys::ibv_qp_state::IBV_QPS_RTS,
            timeout: connection.timeout,
            retry_cnt: connection.retries.min(6),
            rnr_retry: connection.retries.min(6),
            sq_psn: first_packet,
            max_rd_atomic: 1,
            ..Default::default()
        };
        let which = mask::IBV_QP_STATE
            | mask::IBV_QP_TIMEOUT
            | mask::IBV_QP_RETRY_CNT
            | mask::IBV_QP_RNR_RETRY
            | mask::IBV_QP_SQ_PSN
            | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut attributes, which)
    }

    /// Ends it: nothing is sent or received any more, and what was under way fails.
    pub fn fail(&self) -> io::Result<()> {
        let mut attributes = sys::ibv_qp_attr {
            qp_state: sys::ibv_qp_state::IBV_QPS_ERR,
            ..Default::default()
        };
        self.modify(&mut attributes, mask::IBV_QP_STATE)
    }

    /// Posts a receive for a write with immediate data: it needs no memory.
    pub fn post_receive(&self) -> io::Result<()> {
        let Some(post) = self.domain.context().ops().post_recv else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let mut request = sys::ibv_recv_wr {
            wr_id: 0,
            next: null_mut(),
            sg_list: null_mut(),
            num_sge: 0,
        };
        let mut bad = null_mut();
        // SAFETY: the queue pair is alive; the request is copied before the call returns.
        check(unsafe { post(self.pair.as_ptr(), &raw mut request, &raw mut bad) })
    }

    /// Posts a chain with one doorbell, and empties it. Requests may carry their data in themselves
    /// that lies in `inline`.
    pub fn post(&self, chain: &mut Chain, inline: &Region) -> io::Result<()> {
        if chain.requests.is_empty() {
            return Ok(());
        }
        let Some(post) = self.domain.context().ops().post_send else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let first = chain.link(inline);
        let mut bad = null_mut();
        // SAFETY: the queue pair is alive; the chain's requests and lists are live until the call
        // returns, by which time they are copied. Data that the CPU reads meanwhile is within
        // `inline`, by the check in `link`.
        let posted = check(unsafe { post(self.pair.as_ptr(), first, &raw mut bad) });
        chain.clear();
        posted
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::ibv_destroy_qp(self.pair.as_ptr()) };
    }
}

/// A write to the peer's memory.
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// What its completion says.
    pub id: u64,
    /// Where the data is.
    pub pieces: &'a [Piece],
    /// Where it goes, as the peer names it.
    pub address: u64,
    /// The key of that memory.
    pub key: u32,
    /// The peer hears of it, with this.
    pub immediate: Option<u32>,
    /// This side hears of it; of a failure it always does.
    pub signalled: bool,
    /// The data is copied into the request, if it may be.
    pub inline: bool,
}

/// Work requests to be posted together. Its storage is used again and again.
#[derive(Default)]
pub struct Chain {
    requests: Vec<sys::ibv_send_wr>,
    pieces: Vec<sys::ibv_sge>,
}

// SAFETY: the pointers inside requests are set, used and forgotten within one call of `post`.
unsafe impl Send for Chain {}

impl Chain {
    /// Room for so many requests and pieces, beyond which it allocates.
    pub fn with_capacity(requests: usize, pieces: usize) -> Self {
        Chain {
            requests: Vec::with_capacity(requests),
            pieces: Vec::with_capacity(pieces),
        }
    }

    /// How many requests it has.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    fn clear(&mut self) {
        self.requests.clear();
        self.pieces.clear();
    }

    /// Appends a write.
    pub fn push(&mut self, write: &Write<'_>) {
        let mut flags = sys::ibv_send_flags(0);
        if write.signalled {
            flags |= sys::ibv_send_flags::IBV_SEND_SIGNALED;
        }
        if write.inline {
            flags |= sys::ibv_send_flags::IBV_SEND_INLINE;
        }
        self.requests.push(sys::ibv_send_wr {
            wr_id: write.id,
            num_sge: write.pieces.len() as libc::c_int,
            opcode: match write.immediate {
                Some(_) => sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
                None => sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            },
            send_flags: flags.0,
            __bindgen_anon_1: sys::ibv_send_wr__bindgen_ty_1 {
                imm_data: write.immediate.unwrap_or(0).to_be(),
            },
            wr: sys::ibv_send_wr__bindgen_ty_2 {
                rdma: sys::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 {
                    remote_addr: write.address,
                    rkey: write.key,
                },
            },
            ..Default::default()
        });
        let list = write.pieces.iter().map(|piece| sys::ibv_sge {
            addr: piece.address,
            length: piece.len,
            lkey: piece.key,
        });
        self.pieces.extend(list);
    }

    /// Sets the pointers from request to request and to its pieces; returns the first one. Data
    /// that is not in `inline`, or that the CPU finds elsewhere than the device, is left to the device.
    fn link(&mut self, inline: &Region) -> *mut sys::ibv_send_wr {
        let requests = self.requests.as_mut_ptr();
        let pieces = self.pieces.as_mut_ptr();
        let count = self.requests.len();
        let mut next_piece = 0;
        for (index, request) in self.requests.iter_mut().enumerate() {
            // In bounds, or one behind the end for a last request without pieces.
            request.sg_list = pieces.wrapping_add(next_piece);
            let end = next_piece + request.num_sge as usize;
            let list = self.pieces.get(next_piece..end).unwrap_or_default();
            next_piece = end;
            if !list.iter().all(|piece| inline.holds(piece)) {
                request.send_flags &= !sys::ibv_send_flags::IBV_SEND_INLINE.0;
            }
            request.next = if index + 1 < count {
                requests.wrapping_add(index + 1)
            } else {
                null_mut()
            };
        }
        requests
    }
}

fn mtu_code(bytes: u16) -> sys::ibv_mtu {
    match bytes {
        0..512 => sys::IBV_MTU_256,
        512..1024 => sys::IBV_MTU_512,
        1024..2048 => sys::IBV_MTU_1024,
        2048..4096 => sys::IBV_MTU_2048,
        _ => sys::IBV_MTU_4096,
    }
}
