//! Values of the configuration that are more than text or numbers.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use farbus_vfio::soft_nvme::parse_size;
use farbus_vfio::sysfs::ClassCode;
use serde::de::{Deserialize, Deserializer, Error, Visitor};

use crate::sources::Count;

/// A string that means a `T`.
#[derive(Clone, Debug)]
pub(super) struct Parsed<T>(pub(super) T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(Error::custom)
    }
}

/// `HOST:PORT`.
pub(super) struct Listen(pub(super) String);

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(format!(
                "{text:?} is not an address and port; write HOST:PORT"
            )),
        }
    }
}

/// A path that does not depend on where the daemon was started.
pub(super) struct AbsolutePath(pub(super) PathBuf);

impl FromStr for AbsolutePath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if Path::new(text).is_absolute() {
            return Ok(Self(text.into()));
        }
        Err(format!(
            "the path {text:?} is not absolute; begin it with /"
        ))
    }
}

/// A PCI id: four hexadecimal digits.
pub(super) struct PciId(pub(super) u16);

impl FromStr for PciId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        hexadecimal(text, 4)
            .map(|id| Self(id as u16))
            .ok_or_else(|| {
                format!("{text:?} is no PCI id; write four hexadecimal digits, such as \"1b36\"")
            })
    }
}

/// A class of devices: a name or six hexadecimal digits.
pub(super) struct Class(pub(super) ClassCode);

impl FromStr for Class {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "nvme" {
            return Ok(Self(ClassCode::NVME));
        }
        hexadecimal(text, 6).map(|code| Self(ClassCode(code)))
            .ok_or_else(|| format!("{text:?} is no class; write \"nvme\", or six hexadecimal digits such as \"010802\""))
    }
}

fn hexadecimal(text: &str, digits: usize) -> Option<u32> {
    let all = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    (all && text.len() == digits)
        .then(|| u32::from_str_radix(text, 16).ok())
        .flatten()
}

/// A number of bytes, such as `1073741824` or `"1GiB"`.
pub(super) struct Size(pub(super) u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(TextOrNumber)? {
            Value::Number(bytes) if bytes > 0 => Ok(Self(bytes)),
            Value::Number(bytes) => Err(wrong_size(&bytes)),
            Value::Text(text) => parse_size(&text).map(Self).ok_or_else(|| wrong_size(&text)),
        }
    }
}

fn wrong_size<E: Error>(value: &dyn fmt::Debug) -> E {
    E::custom(format!(
        "{value:?} is not a size; write bytes, or a number with KiB, MiB, GiB or TiB such as \"1GiB\""
    ))
}

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wrong = |value: &dyn fmt::Debug| {
            Error::custom(format!(
                "{value:?} is no count; write 1 to 65535, or \"all\""
            ))
        };
        match deserializer.deserialize_any(TextOrNumber)? {
            Value::Text(text) if text == "all" => Ok(Self::All),
            Value::Text(text) => Err(wrong(&text)),
            Value::Number(count) => match u16::try_from(count) {
                Ok(count) if count > 0 => Ok(Self::Exactly(count)),
                _ => Err(wrong(&count)),
            },
        }
    }
}

/// A number of seconds, at most `MAX`.
pub(super) struct Seconds<const MAX: u64>(pub(super) Duration);

impl<'de, const MAX: u64> Deserialize<'de> for Seconds<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(TextOrNumber)? {
            Value::Number(seconds) if seconds <= MAX => Ok(Self(Duration::from_secs(seconds))),
            Value::Number(seconds) => Err(Error::custom(format!(
                "{seconds} seconds are too many; write 0 to {MAX}"
            ))),
            Value::Text(text) => Err(Error::custom(format!(
                "{text:?} is not a number of seconds; write 0 to {MAX}, without quotes"
            ))),
        }
    }
}

enum Value {
    Text(String),
    Number(u64),
}

struct TextOrNumber;

impl Visitor<'_> for TextOrNumber {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number or a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Value, E> {
        u64::try_from(number)
            .map(Value::Number)
            .map_err(|_| E::custom(format!("{number} is negative; write a number above 0")))
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Number(number))
    }
}
