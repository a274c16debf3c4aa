//! Messages to bytes, and bytes to messages. The tables of `docs/protocol.md`, as code.

use super::bounded::utf8;
use super::codec::{Put, Reader, in_range};
use super::{
    Data, Description, Epoch, ExportName, FaultCode, Header, InterruptKind, Kind, Label, Listing,
    MAGIC, Message, ProtocolVersion, RateLimits, RdmaEndpoint, RdmaKey, RefusalCode, RequestId,
    Text, WireError,
};

impl Message {
    /// Appends the control part to `out` and returns the frame's header, without an epoch.
    ///
    /// Fails, with `out` unchanged, on values that a decoder would refuse.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<Header, WireError> {
        self.check()?;
        let start = out.len();
        match self {
            Message::Hello {
                oldest,
                newest,
                label,
            } => {
                out.put_bytes(&MAGIC);
                out.put_u16(*oldest);
                out.put_u16(*newest);
                put_text(out, label.as_str());
            }
            Message::Welcome { version, label } => {
                out.put_bytes(&MAGIC);
                out.put_u16(version.number());
                put_text(out, label.as_str());
            }
            Message::Refused { code, text } => {
                out.put_u16(code.number());
                put_text(out, text.as_str());
            }
            Message::Claim { export } => put_text(out, export.as_str()),
            Message::ClaimWith { export, limits } => {
                put_text(out, export.as_str());
                limits.encode(out);
            }
            Message::Claimed {
                epoch,
                shadow_len,
                tags,
            } => {
                out.put_u64(epoch.0);
                out.put_u32(*shadow_len);
                out.put_u16(*tags);
                out.put_u16(0);
            }
            Message::Description(description) => description.encode(out),
            Message::EngineNotice { blob } => {
                out.put_u32(blob.len() as u32);
                out.put_bytes(blob);
            }
            Message::List { after } => {
                put_text(out, after.as_ref().map_or("", ExportName::as_str));
            }
            Message::Listing(listing) => listing.encode(out),
            Message::ConfigRead {
                request,
                offset,
                len,
            } => {
                out.put_u32(request.0);
                out.put_u16(*offset);
                out.put_u16(*len);
            }
            Message::ConfigWrite { offset, data } => {
                out.put_u16(*offset);
                put_data(out, data);
            }
            Message::RegisterRead {
                request,
                region,
                offset,
                len,
            } => {
                out.put_u32(request.0);
                out.put_u8(*region);
                out.put_u8(*len);
                out.put_u16(0);
                out.put_u64(*offset);
            }
            Message::RegisterWrite {
                region,
                offset,
                data,
            }
            | Message::RegisterUpdate {
                region,
                offset,
                data,
            } => {
                out.put_u8(*region);
                out.put_bytes(&[0; 5]);
                out.put_u16(data.len() as u16);
                out.put_u64(*offset);
                out.put_bytes(data);
            }
            Message::Value {
                request,
                status,
                data,
            } => {
                out.put_u32(request.0);
                out.put_u16(*status);
                put_data(out, data);
            }
            Message::Interrupt { kind, vector } => {
                out.put_u8(*kind as u8);
                out.put_u8(0);
                out.put_u16(*vector);
            }
            Message::Reset { request } => out.put_u32(request.0),
            Message::ResetDone { request, outcome } => {
                out.put_u32(request.0);
                put_outcome(out, outcome.as_ref().err());
            }
            Message::Ping { nonce } | Message::Pong { nonce } => out.put_u64(*nonce),
            Message::Fault { code, text } => {
                out.put_u16(*code as u16);
                put_text(out, text.as_str());
            }
            Message::RdmaOffer(endpoint) => endpoint.encode(out),
            Message::RdmaAnswer(Ok(endpoint)) => {
                put_outcome(out, None);
                endpoint.encode(out);
            }
            Message::RdmaAnswer(Err(text)) => put_outcome(out, Some(text)),
            Message::RdmaChoice(outcome) => put_outcome(out, outcome.as_ref().err()),
            Message::RdmaKeys(keys) => keys.iter().for_each(|key| key.encode(out)),
            Message::Describe | Message::Release | Message::Released => {}
        }
        Ok(Header::plain(self.kind(), out.len() - start))
    }

    /// Reads and checks a message.
    pub fn decode(header: &Header, control: &[u8]) -> Result<Self, WireError> {
        header.check()?;
        header.check_control(control)?;
        let mut reader = Reader::new(header.kind.name(), control);
        let message = Self::decode_fields(header.kind, &mut reader)?;
        reader.end()?;
        message.check()?;
        Ok(message)
    }

    fn decode_fields(kind: Kind, reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(match kind {
            Kind::Hello => {
                take_magic(reader)?;
                Message::Hello {
                    oldest: reader.u16()?,
                    newest: reader.u16()?,
                    label: Label::from_wire(take_counted(reader)?)?,
                }
            }
            Kind::Welcome => {
                take_magic(reader)?;
                let number = reader.u16()?;
                Message::Welcome {
                    version: ProtocolVersion::from_number(number).ok_or(
                        WireError::UnknownCode {
                            what: "protocol version",
                            value: number.into(),
                        },
                    )?,
                    label: Label::from_wire(take_counted(reader)?)?,
                }
            }
            Kind::Refused => Message::Refused {
                code: RefusalCode::from_number(reader.u16()?),
                text: Text::from_wire(take_counted(reader)?)?,
            },
            Kind::Claim => Message::Claim {
                export: ExportName::new(utf8("an export name", take_counted(reader)?)?)?,
            },
            Kind::ClaimWith => Message::ClaimWith {
                export: ExportName::new(utf8("an export name", take_counted(reader)?)?)?,
                limits: RateLimits::decode(reader)?,
            },
            Kind::Claimed => {
                let epoch = Epoch(reader.u64()?);
                let shadow_len = reader.u32()?;
                let tags = reader.u16()?;
                reader.reserved::<2>()?;
                Message::Claimed {
                    epoch,
                    shadow_len,
                    tags,
                }
            }
            Kind::Describe => Message::Describe,
            Kind::Description => Message::Description(Box::new(Description::decode(reader)?)),
            Kind::EngineNotice => {
                let len = reader.u32()?;
                Message::EngineNotice {
                    blob: reader.bytes(len as usize)?.to_vec(),
                }
            }
            Kind::List => {
                let after = utf8("an export name", take_counted(reader)?)?;
                Message::List {
                    after: match after {
                        "" => None,
                        after => Some(ExportName::new(after)?),
                    },
                }
            }
            Kind::Listing => Message::Listing(Listing::decode(reader)?),
            Kind::ConfigRead => Message::ConfigRead {
                request: RequestId(reader.u32()?),
                offset: reader.u16()?,
                len: reader.u16()?,
            },
            Kind::ConfigWrite => Message::ConfigWrite {
                offset: reader.u16()?,
                data: Data::new(take_counted(reader)?)?,
            },
            Kind::RegisterRead => {
                let request = RequestId(reader.u32()?);
                let region = reader.u8()?;
                let len = reader.u8()?;
                reader.reserved::<2>()?;
                let offset = reader.u64()?;
                Message::RegisterRead {
                    request,
                    region,
                    offset,
                    len,
                }
            }
            Kind::RegisterWrite => {
                let (region, offset, data) = take_register(reader)?;
                Message::RegisterWrite {
                    region,
                    offset,
                    data,
                }
            }
            Kind::RegisterUpdate => {
                let (region, offset, data) = take_register(reader)?;
                Message::RegisterUpdate {
                    region,
                    offset,
                    data,
                }
            }
            Kind::Value => Message::Value {
                request: RequestId(reader.u32()?),
                status: reader.u16()?,
                data: Data::new(take_counted(reader)?)?,
            },
            Kind::Interrupt => {
                let kind = InterruptKind::from_number(reader.u8()?)?;
                reader.reserved::<1>()?;
                Message::Interrupt {
                    kind,
                    vector: reader.u16()?,
                }
            }
            Kind::Reset => Message::Reset {
                request: RequestId(reader.u32()?),
            },
            Kind::ResetDone => {
                let request = RequestId(reader.u32()?);
                let outcome = take_outcome(reader)?;
                Message::ResetDone { request, outcome }
            }
            Kind::Ping => Message::Ping {
                nonce: reader.u64()?,
            },
            Kind::Pong => Message::Pong {
                nonce: reader.u64()?,
            },
            Kind::Release => Message::Release,
            Kind::Released => Message::Released,
            Kind::Fault => Message::Fault {
                code: FaultCode::from_number(reader.u16()?)?,
                text: Text::from_wire(take_counted(reader)?)?,
            },
            Kind::RdmaOffer => Message::RdmaOffer(RdmaEndpoint::decode(reader)?),
            Kind::RdmaAnswer => Message::RdmaAnswer(match take_outcome(reader)? {
                Ok(()) => Ok(RdmaEndpoint::decode(reader)?),
                Err(text) => Err(text),
            }),
            Kind::RdmaChoice => Message::RdmaChoice(take_outcome(reader)?),
            Kind::RdmaKeys => {
                let mut keys = Vec::with_capacity(reader.rest().len() / RdmaKey::LEN);
                while !reader.rest().is_empty() {
                    keys.push(RdmaKey::decode(reader)?);
                }
                Message::RdmaKeys(keys)
            }
            // These have entries, which are read in place and never through here.
            Kind::Submit | Kind::Complete => {
                return Err(WireError::WrongKind {
                    found: kind,
                    wanted: "a message without entries",
                });
            }
        })
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.put_u16(text.len() as u16);
    out.put_bytes(text.as_bytes());
}

fn put_data(out: &mut Vec<u8>, data: &Data) {
    out.put_u16(data.len() as u16);
    out.put_bytes(data);
}

fn take_counted<'a>(reader: &mut Reader<'a>) -> Result<&'a [u8], WireError> {
    let len = reader.u16()?;
    reader.bytes(len.into())
}

/// Success, or a failure and what people should know of it.
fn put_outcome(out: &mut Vec<u8>, failure: Option<&Text>) {
    out.put_u16(failure.is_some().into());
    put_text(out, failure.map_or("", Text::as_str));
}

fn take_outcome(reader: &mut Reader<'_>) -> Result<Result<(), Text>, WireError> {
    let failed = reader.u16()?;
    let text = Text::from_wire(take_counted(reader)?)?;
    in_range("an outcome", failed, 0, 1)?;
    if failed == 1 {
        return Ok(Err(text));
    }
    // A text on success would be lost here, and so not survive a round trip.
    in_range("the length of a success's text", text.as_str().len(), 0, 0)?;
    Ok(Ok(()))
}

fn take_magic(reader: &mut Reader<'_>) -> Result<(), WireError> {
    match *reader.array()? {
        MAGIC => Ok(()),
        other => Err(WireError::Magic(other)),
    }
}

fn take_register(reader: &mut Reader<'_>) -> Result<(u8, u64, Data), WireError> {
    let region = reader.u8()?;
    reader.reserved::<5>()?;
    let len = reader.u16()?;
    let offset = reader.u64()?;
    let data = Data::new(reader.bytes(len.into())?)?;
    Ok((region, offset, data))
}
