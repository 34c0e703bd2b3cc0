/* SHA-256 (FIPS 180-4), so that the guest needs nothing but libc. */
#ifndef SHA256_H
#define SHA256_H

#include <stddef.h>
#include <stdint.h>

struct sha256 {
    uint32_t hash[8];
    uint64_t bytes;
    uint8_t block[64];
};

void sha256_start(struct sha256 *sha);
void sha256_update(struct sha256 *sha, const void *data, size_t bytes);
void sha256_digest(const struct sha256 *sha, uint8_t digest[32]); /* of what came so far; `sha` may go on */

#endif
