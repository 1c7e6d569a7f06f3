import { Problem } from '../problem.ts'

/** PEM text (RFC 7468) of a DER structure. */
export const toPem = (label: string, der: Uint8Array): string => {
  const lines =
    Buffer.from(der)
      .toString('base64')
      .match(/.{1,64}/g) ?? []
  return `-----BEGIN ${label}-----\n${lines.join('\n')}\n-----END ${label}-----\n`
}

const pemLimits = { blocks: 64, length: 256 << 10 } as const

/** The labels of the blocks in a text, in order. */
export const pemLabels = (text: string): readonly string[] => [...text.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----/g)].map(([, label = '']) => label)

/** Every block of this label, in order; at most 64 blocks and 256 KiB unless told. Throws Problem('malformed') when there is none. */
export const fromPem = (label: string, text: string, most: { readonly blocks: number; readonly length: number } = pemLimits): readonly Uint8Array[] => {
  if (text.length > most.length) throw new Problem('malformed', `PEM of more than ${most.length >> 10} KiB`)
  const blocks = [...text.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----([A-Za-z0-9+/=\s]*)-----END \1-----/g)].filter(([, found]) => found === label)
  if (blocks.length === 0 || blocks.length > most.blocks) throw new Problem('malformed', `${blocks.length} PEM blocks of ${label}`)
  return blocks.map(([, , body = '']) => new Uint8Array(Buffer.from(body, 'base64')))
}

/** DER of a certificate that is PEM or DER. Throws Problem('malformed') for PEM without one. */
export const certificateBytes = (bytes: Uint8Array): Uint8Array => {
  const text = Buffer.from(bytes).toString('latin1')
  return text.includes('-----BEGIN') ? (fromPem('CERTIFICATE', text)[0] ?? bytes) : new Uint8Array(bytes)
}
