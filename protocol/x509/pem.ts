import { Problem } from '../problem.ts'

/** PEM text (RFC 7468) of a DER structure. */
export const toPem = (label: string, der: Uint8Array): string => {
  const lines =
    Buffer.from(der)
      .toString('base64')
      .match(/.{1,64}/g) ?? []
  return `-----BEGIN ${label}-----\n${lines.join('\n')}\n-----END ${label}-----\n`
}

/** Every block of this label, in order; at most 64 blocks, 256 KiB. Throws Problem('malformed') when there is none. */
export const fromPem = (label: string, text: string): readonly Uint8Array[] => {
  if (text.length > 256 << 10) throw new Problem('malformed', 'PEM of more than 256 KiB')
  const blocks = [...text.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----([A-Za-z0-9+/=\s]*)-----END \1-----/g)].filter(([, found]) => found === label)
  if (blocks.length === 0 || blocks.length > 64) throw new Problem('malformed', `${blocks.length} PEM blocks of ${label}`)
  return blocks.map(([, , body = '']) => new Uint8Array(Buffer.from(body, 'base64')))
}
