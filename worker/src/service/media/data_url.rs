//! `data:` URLs to the bytes of a picture.

use base64::{Engine as _, engine::general_purpose};

use super::{LIMITS, shorten};

/// The bytes that a `data:` URL holds; `rest` is what follows its scheme.
pub fn decode(rest: &str) -> Result<Vec<u8>, String> {
    let Some((media, payload)) = rest.split_once(',') else {
        return Err("a data URL needs a comma before its data".to_owned());
    };
    let Some(media) = media.strip_suffix(";base64") else {
        return Err("only base64 data URLs are supported: data:image/png;base64,...".to_owned());
    };
    if !media.starts_with("image/") {
        return Err(format!("media type {:?} is not an image", shorten(media)));
    }
    // Three bytes of every four characters: refused by length, before decoding.
    let bytes = payload.len() / 4 * 3;
    if bytes > LIMITS.bytes + 2 {
        return Err(format!(
            "the image has about {bytes} bytes, the limit is {}",
            LIMITS.bytes
        ));
    }
    let decoded = general_purpose::STANDARD.decode(payload);
    decoded.map_err(|error| format!("the data URL is not valid base64: {error}"))
}
