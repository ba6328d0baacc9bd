//! An image as terminal cells: two pixels to a cell, by the upper half block.

use std::fmt::Write as _;

use anyhow::Context;
use image::imageops::FilterType;

/// Draws encoded image `bytes` `width` cells wide; colours are 24-bit, or shades of text where the terminal has none.
pub fn draw(bytes: &[u8], width: u32, has_colour: bool) -> anyhow::Result<String> {
    let picture = image::load_from_memory(bytes)
        .context("cannot decode the picture")?
        .to_rgb8();
    let height = (width * picture.height() / picture.width().max(1)).max(2) & !1;
    let scaled = image::imageops::resize(&picture, width, height, FilterType::Nearest);
    let mut text = String::new();
    for y in (0..height).step_by(2) {
        for x in 0..width {
            let (upper, lower) = (scaled.get_pixel(x, y).0, scaled.get_pixel(x, y + 1).0);
            if has_colour {
                let ([r, g, b], [s, h, c]) = (upper, lower);
                let _ = write!(text, "\x1b[38;2;{r};{g};{b};48;2;{s};{h};{c}m▀");
            } else {
                text.push(shade(upper, lower));
            }
        }
        text.push_str(if has_colour { "\x1b[0m\n" } else { "\n" });
    }
    Ok(text)
}

fn shade(upper: [u8; 3], lower: [u8; 3]) -> char {
    let sum: u32 = upper.iter().chain(&lower).map(|&part| u32::from(part)).sum();
    [' ', '░', '▒', '▓', '█'][(sum * 5 / (6 * 256)).min(4) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_rows_of_pixels_are_one_row_of_cells() {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let picture = image::RgbImage::from_fn(2, 2, |x, _| image::Rgb([if x == 0 { 0 } else { 255 }; 3]));
        picture.write_to(&mut bytes, image::ImageFormat::Png).expect("png");
        assert_eq!(draw(bytes.get_ref(), 2, false).expect("drawn"), " █\n");
        assert!(
            draw(bytes.get_ref(), 2, true)
                .expect("drawn")
                .starts_with("\x1b[38;2;0;0;0;48;2;0;0;0m▀")
        );
    }

    #[test]
    fn bytes_that_are_no_image_are_an_error() {
        assert!(draw(b"nothing", 2, false).is_err());
    }
}
