//! Rows of a parquet file through the record reader (no Arrow).

use std::{collections::BTreeMap, fs::File, path::Path};

use parquet::{
    file::reader::SerializedFileReader,
    record::{Field, Row},
};

use super::Value;
use crate::error::{ArtifactError, io};

/// Calls `visit` for each row.
pub(super) fn read<E: From<ArtifactError>>(
    path: &Path,
    visit: &mut impl FnMut(Result<BTreeMap<String, Value>, String>) -> Result<(), E>,
) -> Result<(), E> {
    let file = File::open(path).map_err(io("open", path))?;
    let damaged = |error: parquet::errors::ParquetError| ArtifactError::Parse {
        path: path.to_path_buf(),
        reason: error.to_string(),
    };
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    for row in reader {
        // An unreadable page ends the file: the reader cannot find the row after it.
        visit(Ok(columns(row.map_err(damaged)?)))?;
    }
    Ok(())
}

fn columns(row: Row) -> BTreeMap<String, Value> {
    row.into_columns()
        .into_iter()
        .map(|(name, field)| (name, convert(field)))
        .collect()
}

fn convert(field: Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Str(text) => Value::Text(text),
        Field::Bytes(bytes) => Value::Bytes(bytes.data().to_vec()),
        Field::Group(row) => Value::Struct(columns(row)),
        Field::ListInternal(list) => Value::List(list.elements().iter().cloned().map(convert).collect()),
        Field::Float(value) => Value::Text(value.to_string()),
        Field::Double(value) => Value::Text(value.to_string()),
        number => Value::Text(number.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::{
        data_type::{ByteArray, ByteArrayType, Int64Type},
        file::{properties::WriterProperties, writer::SerializedFileWriter},
        schema::parser::parse_message_type,
    };

    use super::*;

    /// A file as the `datasets` library writes it: `image` as a struct of bytes and path.
    fn write(path: &Path) {
        let schema = "message row {
            optional group image { optional binary bytes; optional binary path (UTF8); }
            optional binary question (UTF8);
            optional int64 label;
        }";
        let schema = Arc::new(parse_message_type(schema).expect("schema"));
        let file = File::create(path).expect("create");
        let properties = Arc::new(WriterProperties::builder().build());
        let mut writer = SerializedFileWriter::new(file, schema, properties).expect("writer");
        let mut group = writer.next_row_group().expect("group");
        let text = |values: &[&str]| values.iter().map(|value| ByteArray::from(*value)).collect::<Vec<_>>();
        let columns: [(&[&str], &[i16]); 3] = [
            (&["\u{1}\u{2}"], &[2, 0]),
            (&["a.png"], &[2, 1]),
            (&["what?", "why?"], &[1, 1]),
        ];
        for (values, levels) in columns {
            let mut column = group.next_column().expect("column").expect("some");
            let values = text(values);
            column
                .typed::<ByteArrayType>()
                .write_batch(&values, Some(levels), None)
                .expect("write");
            column.close().expect("close");
        }
        let mut column = group.next_column().expect("column").expect("some");
        column
            .typed::<Int64Type>()
            .write_batch(&[2, 1], Some(&[1, 1]), None)
            .expect("write");
        column.close().expect("close");
        group.close().expect("group");
        writer.close().expect("close");
    }

    #[test]
    fn a_struct_of_bytes_and_path_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("rows.parquet");
        write(&path);
        let mut rows = Vec::new();
        read::<ArtifactError>(&path, &mut |row| {
            rows.push(row.expect("row"));
            Ok(())
        })
        .expect("read");
        assert_eq!(rows.len(), 2);
        let image = Value::Struct(
            [
                ("bytes".to_owned(), Value::Bytes(vec![1, 2])),
                ("path".to_owned(), Value::Text("a.png".into())),
            ]
            .into(),
        );
        assert_eq!(rows[0]["image"], image);
        assert_eq!(rows[0]["question"], Value::Text("what?".into()));
        assert_eq!(rows[0]["label"], Value::Text("2".into()));
        assert_eq!(rows[1]["image"], Value::Null);
    }

    #[test]
    fn a_damaged_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("rows.parquet");
        std::fs::write(&path, b"PAR1 nothing else").expect("write");
        let error = read::<ArtifactError>(&path, &mut |_| Ok(()))
            .expect_err("damaged")
            .to_string();
        assert!(error.contains("rows.parquet"), "{error}");
    }
}
