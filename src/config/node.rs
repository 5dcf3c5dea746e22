//! A tree of values, from TOML or JSON, as serde sees it, with the places of its keys and values.
//!
//! [`read`] makes a struct of a table and finds every fault in it, not only the first one. Pure: text in, values or
//! [`Fault`]s out.

use super::fault::{Fault, alternatives};
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

/// A value and where it stands, in bytes of the text; empty where there was none.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub value: Value,
    pub span: Range<usize>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    Text(String),
    /// What no setting is made of (a date, a fraction, a huge number), in words.
    Other(String),
    List(Vec<Node>),
    Table(Table),
}

/// A table, in the order of the parser; keys are different.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Table(pub Vec<Entry>);

#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub key: String,
    /// Of the key.
    pub span: Range<usize>,
    pub node: Node,
}

impl Table {
    pub fn of_toml(table: DeTable) -> Self {
        let entry = |(key, node): (Spanned<DeString>, Spanned<DeValue>)| Entry {
            span: key.span(),
            key: key.into_inner().into_owned(),
            node: Node::of_toml(node),
        };
        Self(table.into_iter().map(entry).collect())
    }

    pub fn of_json(object: serde_json::Map<String, serde_json::Value>) -> Self {
        let entry = |(key, value)| Entry { key, span: 0..0, node: Node::of_json(value) };
        Self(object.into_iter().map(entry).collect())
    }

    pub fn get(&self, key: &str) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.key == key)
    }

    /// Where the value of `path` stands, or the last part of the path that is there.
    pub fn span_of(&self, path: &[String]) -> Option<Range<usize>> {
        let (first, rest) = path.split_first()?;
        let node = &self.get(first)?.node;
        match &node.value {
            Value::Table(table) if !rest.is_empty() => table.span_of(rest).or_else(|| Some(node.span.clone())),
            _ => Some(node.span.clone()),
        }
    }
}

impl Node {
    fn of_toml(node: Spanned<DeValue>) -> Self {
        let span = node.span();
        let value = match node.into_inner() {
            DeValue::String(text) => Value::Text(text.into_owned()),
            DeValue::Boolean(value) => Value::Bool(value),
            DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
                Ok(value) => Value::Integer(value),
                Err(_) => Value::Other("a number of too many digits".into()),
            },
            DeValue::Float(number) => Value::Other(format!("the fraction {number}")),
            DeValue::Datetime(date) => Value::Other(format!("the date {date}")),
            DeValue::Array(list) => Value::List(list.into_iter().map(Self::of_toml).collect()),
            DeValue::Table(table) => Value::Table(Table::of_toml(table)),
        };
        Self { value, span }
    }

    fn of_json(value: serde_json::Value) -> Self {
        use serde_json::Value as Json;
        let value = match value {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(value),
            Json::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(value), _) => Value::Integer(value.into()),
                (_, Some(value)) => Value::Integer(value.into()),
                _ => Value::Other(format!("the fraction {number}")),
            },
            Json::String(text) => Value::Text(text),
            Json::Array(list) => Value::List(list.into_iter().map(Self::of_json).collect()),
            Json::Object(object) => Value::Table(Table::of_json(object)),
        };
        Self { value, span: 0..0 }
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Integer(value) => match (u64::try_from(*value), i64::try_from(*value)) {
                (Ok(value), _) => Unexpected::Unsigned(value),
                (_, Ok(value)) => Unexpected::Signed(value),
                _ => Unexpected::Other("a number of too many digits"),
            },
            Value::Text(text) => Unexpected::Str(text),
            Value::Other(what) => Unexpected::Other(what),
            Value::List(_) => Unexpected::Seq,
            Value::Table(_) => Unexpected::Map,
        }
    }
}

/// Reads a struct all of whose fields may be missing. What is wrong is added to `faults`, and left out.
pub fn read<T: DeserializeOwned + Default>(table: &Table, faults: &mut Vec<Fault>) -> T {
    let mut good = Table::default();
    for entry in &table.0 {
        // Each key by itself, so that one that is wrong doesn't hide the next one.
        let alone = Table(vec![entry.clone()]);
        match T::deserialize(Entries::node(&alone)) {
            Ok(_) => good.0.push(entry.clone()),
            Err(fault) => faults.push(fault),
        }
    }
    T::deserialize(Entries::node(&good)).unwrap_or_else(|fault| {
        faults.push(fault);
        T::default()
    })
}

/// A [`Node`] for serde.
struct Reader<'a>(&'a Node);

impl<'de> de::Deserializer<'de> for Reader<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let node = self.0;
        let read = match &node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Integer(value) => match (u64::try_from(*value), i64::try_from(*value)) {
                (Ok(value), _) => visitor.visit_u64(value),
                (_, Ok(value)) => visitor.visit_i64(value),
                _ => Err(de::Error::invalid_value(node.unexpected(), &visitor)),
            },
            Value::Text(text) => visitor.visit_str(text),
            Value::Other(_) => Err(de::Error::invalid_type(node.unexpected(), &visitor)),
            Value::List(list) => visitor.visit_seq(Items(list.iter())),
            Value::Table(table) => visitor.visit_map(Entries { entries: table.0.iter(), value: None }),
        };
        read.map_err(|fault| fault.at(&node.span))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let read = match &self.0.value {
            Value::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => Err(de::Error::invalid_type(self.0.unexpected(), &alternatives(variants).as_str())),
        };
        read.map_err(|fault: Fault| fault.at(&self.0.span))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map struct identifier ignored_any
    }
}

struct Items<'a>(std::slice::Iter<'a, Node>);

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = Fault;
    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        self.0.next().map(|node| seed.deserialize(Reader(node))).transpose()
    }
}

struct Entries<'a> {
    entries: std::slice::Iter<'a, Entry>,
    value: Option<&'a Entry>,
}

impl<'a> Entries<'a> {
    fn node(table: &'a Table) -> de::value::MapAccessDeserializer<Self> {
        de::value::MapAccessDeserializer::new(Self { entries: table.0.iter(), value: None })
    }
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = Fault;
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        self.value = self.entries.next();
        let Some(entry) = self.value else { return Ok(None) };
        let key = seed.deserialize(entry.key.as_str().into_deserializer());
        key.map(Some).map_err(|fault: Fault| fault.at(&entry.span))
    }
    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let entry = self.value.take().ok_or_else(|| Fault::new("a value without its key"))?;
        seed.deserialize(Reader(&entry.node)).map_err(|fault| fault.under(&entry.key).at(&entry.node.span))
    }
}
