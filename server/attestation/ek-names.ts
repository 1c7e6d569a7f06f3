import type { KeyObject } from 'node:crypto'
import { alg, curve } from '@fleetkey/tpm2/constants.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { marshalPublic } from '@fleetkey/tpm2/structures.ts'
import { ekTemplates } from '@fleetkey/tpm2/templates.ts'

const curves: ReadonlyMap<string, number> = new Map([
  ['P-256', curve.p256],
  ['P-384', curve.p384],
])

/** The names that an EK with this public key may have: one for each template of the TCG that fits. */
export const ekNamesOf = (key: KeyObject): readonly Uint8Array[] => {
  const jwk = key.export({ format: 'jwk' })
  const bytes = (text: string | undefined): Uint8Array => new Uint8Array(Buffer.from(text ?? '', 'base64url'))
  return ekTemplates.flatMap((template) => {
    if (template.type === alg.rsa) {
      const modulus = bytes(jwk.n)
      return jwk.kty === 'RSA' && modulus.length * 8 === template.keyBits ? [nameOf(marshalPublic({ ...template, modulus }))] : []
    }
    return jwk.kty === 'EC' && curves.get(jwk.crv ?? '') === template.curve ? [nameOf(marshalPublic({ ...template, x: bytes(jwk.x), y: bytes(jwk.y) }))] : []
  })
}
