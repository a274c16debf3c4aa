//! What the agent's REST interface and its clients exchange: the JSON of requests and answers.
//!
//! `docs/openapi/agent.json` is made from these types. Field names carry their units; absent and
//! `null` mean the same. Unknown fields of a request are refused, so that a typing error is not
//! taken for a wish that was granted.

#![forbid(unsafe_code)]

mod attachment;
mod device;
mod event;

pub use attachment::{
    Attachment, AttachmentSpec, AttachmentState, Attachments, EndpointSpec, Fabric, Limits, Msix,
    Statistics, Vm, WorkerStatus,
};
pub use device::{Device, DeviceClass, DeviceState, Devices, Selector, Unreachable};
pub use event::Event;
pub use farbus_rest::daemon::{Health, Version};
