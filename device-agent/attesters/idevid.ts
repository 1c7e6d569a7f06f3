import { possessionOf, sha256 } from '@fleetkey/protocol/transcript.ts'
import type { SecureElement } from '../secure-element.ts'
import type { SoftwareKeys } from '../software-keys.ts'
import type { AttesterBy } from './attester.ts'
import { softwareAnswer, softwareSigner } from './software.ts'

/** Proves the device by the factory identity of its secure element (IEEE 802.1AR). The keys of its work are in software. */
export const idevidAttester = (keys: SoftwareKeys, element: SecureElement): AttesterBy<'idevid'> => ({
  ...softwareSigner(keys),
  async hello(of) {
    return {
      type: 'hello',
      ...of,
      presented: { method: 'idevid', chain: [...element.chain], ldevid: keys.ldevid.spki, recipient: keys.recipient.spki },
    }
  },
  answer: async (of) =>
    await softwareAnswer('idevid', keys, of, sha256(element.spki), async (nonce, transcript) => ({
      method: 'idevid',
      signature: await element.sign(possessionOf('idevid', nonce, transcript)),
    })),
})
