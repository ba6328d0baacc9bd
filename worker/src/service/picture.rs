//! Image URLs to pictures, hostile ones refused before anything is allocated for them.

use base64::{Engine as _, engine::general_purpose};
use flotilla_model::{ImageLimits, Picture};

use super::ServiceError;

/// What one picture of a request may cost.
pub const LIMITS: ImageLimits = ImageLimits {
    bytes: 20 << 20,
    pixels: 32 << 20,
    ..ImageLimits::DEFAULT
};

/// Pictures of one request.
pub const MAX_PICTURES: usize = 16;

/// Decodes the picture of a `data:` URL. Other URLs are refused: the server opens no files and no connections on behalf
/// of a client.
pub fn decode(url: &str) -> Result<Picture, ServiceError> {
    let invalid = |message: String| ServiceError::invalid("image_url", message);
    let Some(rest) = url.strip_prefix("data:") else {
        return Err(invalid(refusal(url)));
    };
    let Some((media, payload)) = rest.split_once(',') else {
        return Err(invalid("a data URL needs a comma before its data".to_owned()));
    };
    let Some(media) = media.strip_suffix(";base64") else {
        return Err(invalid(
            "only base64 data URLs are supported: data:image/png;base64,...".to_owned(),
        ));
    };
    if !media.starts_with("image/") {
        return Err(invalid(format!("media type {:?} is not an image", shorten(media))));
    }
    // Three bytes of every four characters: refused by length, before decoding.
    if payload.len() / 4 * 3 > LIMITS.bytes + 2 {
        let message = format!(
            "the image has about {} bytes, the limit is {}",
            payload.len() / 4 * 3,
            LIMITS.bytes
        );
        return Err(invalid(message));
    }
    let bytes = general_purpose::STANDARD
        .decode(payload)
        .map_err(|error| invalid(format!("the data URL is not valid base64: {error}")))?;
    Picture::decode(&bytes, LIMITS).map_err(|error| invalid(error.to_string()))
}

fn refusal(url: &str) -> String {
    let scheme = url.split_once(':').map_or("", |(scheme, _)| scheme);
    match scheme.to_ascii_lowercase().as_str() {
        "file" => "file:// images are refused: send the image as a data URL (data:image/png;base64,...)".to_owned(),
        "http" | "https" => format!(
            "{scheme}:// images are refused, this server opens no connections: send the image as a data URL \
             (data:image/png;base64,...)"
        ),
        _ => format!("{:?} is not a data URL (data:image/png;base64,...)", shorten(url)),
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(url: &str) -> String {
        decode(url).expect_err("refused").to_string()
    }

    #[test]
    fn a_png_in_a_data_url_is_decoded() {
        let mut png = std::io::Cursor::new(Vec::new());
        image::GrayImage::from_pixel(3, 2, image::Luma([9]))
            .write_to(&mut png, image::ImageFormat::Png)
            .expect("encodes");
        let url = format!(
            "data:image/png;base64,{}",
            general_purpose::STANDARD.encode(png.into_inner())
        );
        let picture = decode(&url).expect("decodes");
        assert_eq!((picture.width, picture.height), (3, 2));
    }

    #[test]
    fn files_and_connections_are_refused_by_name() {
        assert!(message("file:///etc/passwd").contains("file:// images are refused"));
        assert!(message("http://169.254.169.254/latest").contains("opens no connections"));
        assert!(message("HTTPS://example.com/a.png").contains("opens no connections"));
        assert!(message("/etc/passwd").contains("is not a data URL"));
    }

    #[test]
    fn broken_data_urls_are_refused_with_what_is_broken() {
        assert!(message("data:image/png;base64").contains("comma"));
        assert!(message("data:image/png,abc").contains("base64"));
        assert!(message("data:text/html;base64,PGI+").contains("not an image"));
        assert!(message("data:image/png;base64,?").contains("not valid base64"));
        assert!(message("data:image/png;base64,AAAA").contains("image:"));
    }

    #[test]
    fn a_payload_over_the_limit_is_refused_before_it_is_decoded() {
        let url = format!("data:image/png;base64,{}", "?".repeat(LIMITS.bytes / 3 * 4 + 16));
        assert!(message(&url).contains("the limit is"));
    }

    proptest! {
        #[test]
        fn no_url_panics(url in "(data:)?(image/)?[a-z;,:/]{0,12}(;base64,)?\\PC{0,40}") {
            let _ = decode(&url);
        }
    }
}
