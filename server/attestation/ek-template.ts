import { alg } from '@fleetkey/tpm2/constants.ts'
import { ekTemplateFor } from '@fleetkey/tpm2/templates.ts'
import { checkArea, readKey, usableKey, type TpmKey } from './keys.ts'
import { fail } from './reasons.ts'
import { isRoca } from '@fleetkey/protocol/x509/request/roca.ts'

/**
 * The EK's public area: made by a template of the TCG EK credential profile (L-1, L-2, or the high range H-1 to H-3), so that it can neither sign nor be used
 * without its policy; RSA-2048, P-256 or P-384; no modulus of CVE-2017-15361.
 */
export const checkEk = (bytes: Uint8Array): TpmKey => {
  const key = readKey('ek', bytes)
  const template = ekTemplateFor(key)
  checkArea('ek', key, template)
  if (key.type === alg.rsa && template.type === alg.rsa && key.keyBits !== template.keyBits) fail('ek.key-size', `${key.keyBits} bits`)
  const usable = usableKey('ek', bytes, key)
  if (key.type === alg.rsa && isRoca(key.modulus)) fail('ek.roca')
  return usable
}
